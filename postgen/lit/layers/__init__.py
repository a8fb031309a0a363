"""The layer types, one file per type. `make_layer` creates a layer from the name of its type."""

from postgen.lit.layers.base import LitLayer, Shape, make_layer

__all__ = ["LitLayer", "Shape", "make_layer"]
