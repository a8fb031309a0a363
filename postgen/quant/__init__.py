"""Quantisation of video DiTs: number formats, calibration, block-wise training, solvers, and quantised linear layers
that diffusers can save and load.
"""

from .formats import FORMATS, Format, format_of
from .hessian import Hessian, HessianSum
from .linear import QLinear
from .merging import merge_lora_
from .model import quantize_weights
from .report import QuantReport
from .rounding import Quantized, Scales, quantize
from .solvers import solve
from .spec import LayerSpec, QuantSpec

__all__ = [
    "FORMATS",
    "Format",
    "Hessian",
    "HessianSum",
    "LayerSpec",
    "QLinear",
    "QuantReport",
    "QuantSpec",
    "Quantized",
    "Scales",
    "format_of",
    "merge_lora_",
    "quantize",
    "quantize_weights",
    "solve",
]
