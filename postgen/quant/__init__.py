"""Quantisation of video DiTs: number formats, calibration, block-wise training, solvers, and quantised linear layers
that diffusers can save and load.
"""

from .formats import FORMATS, Format, format_of
from .rounding import Quantized, Scales, quantize
from .spec import LayerSpec, QuantSpec

__all__ = ["FORMATS", "Format", "LayerSpec", "QuantSpec", "Quantized", "Scales", "format_of", "quantize"]
