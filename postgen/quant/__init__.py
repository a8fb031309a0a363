"""Quantisation of video DiTs: number formats, calibration, block-wise training, solvers, and quantised linear layers
that diffusers can save and load.
"""

from .formats import FORMATS, Format, format_of
from .hessian import Hessian, HessianSum
from .linear import QLinear
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
    "QuantSpec",
    "Quantized",
    "Scales",
    "format_of",
    "quantize",
    "solve",
]
