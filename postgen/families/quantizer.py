"""The base class of a quantiser of diffusers models and its registration, for methods."""

from postgen.compat.quantizer import Quantizer
from postgen.compat.quantizers import register_quantizer

__all__ = ["Quantizer", "register_quantizer"]
