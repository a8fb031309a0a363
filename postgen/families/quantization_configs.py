"""Config classes of quantisation methods by name, for programs that quantise a model when they load it."""

from postgen.compat.quantizers import registered_config

__all__ = ["registered_config"]
