"""The layer types, one file each; `make_layer` makes one by its name."""

from postgen.lit.layers.base import LitLayer, Shape, make_layer

__all__ = ["LitLayer", "Shape", "make_layer"]
