"""The base class of a quantiser of diffusers models, its registration, and shapes of packed weights, for methods."""

from postgen.compat.lora_shapes import tell_weight_shapes
from postgen.compat.quantizer import Quantizer
from postgen.compat.quantizers import register_quantizer

__all__ = ["Quantizer", "register_quantizer", "tell_weight_shapes"]
