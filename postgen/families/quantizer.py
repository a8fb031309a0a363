"""The base class of a quantiser of diffusers models, for methods."""

from postgen.compat.quantizer import Quantizer

__all__ = ["Quantizer"]
