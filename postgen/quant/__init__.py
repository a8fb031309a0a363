"""Quantisation of video DiTs: number formats, calibration, block-wise training, solvers, and quantised linear layers
that diffusers can save and load.
"""

from .formats import FORMATS, Format, format_of
from .linear import QLinear
from .rounding import Quantized, Scales, quantize
from .spec import LayerSpec, QuantSpec

__all__ = ["FORMATS", "Format", "LayerSpec", "QLinear", "QuantSpec", "Quantized", "Scales", "format_of", "quantize"]
