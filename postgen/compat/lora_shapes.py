"""Shapes of packed weights in diffusers' LoRA loader of FLUX, which compares LoRAs with the weights of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_FLUX = "FluxTransformer2DModel"
ShapeOf = Callable[[nn.Module], "tuple[int, int] | None"]
"""Layer -> (N, K) of its weight, if its tensor `weight` has another shape; None for other layers."""


def tell_weight_shapes(model: nn.Module, shape_of: ShapeOf) -> None:
    """Make the LoRA loader of a model's pipeline know the shapes of packed weights.

    The loader of FLUX takes a LoRA with a larger shape for a request to make the layer larger; the loaders of other
    models do not compare shapes. It knows the packed weights of bitsandbytes and GGUF. The change of the loader stays;
    nothing changes for the layers of other models.

    Args:
        model: the model.
        shape_of: returns the shape of a packed weight.
    """
    if all(kind.__name__ != _FLUX for kind in type(model).__mro__):
        return
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    stock: Callable[..., torch.Size] = FluxLoraLoaderMixin._calculate_module_shape
    if getattr(stock, "knows_packed_weights", False):
        return

    def shape(model: Any, base_module: Any = None, base_weight_param_name: str | None = None) -> torch.Size:
        layer = base_module
        if layer is None and base_weight_param_name is not None:
            layer = dict(model.named_modules()).get(base_weight_param_name.removesuffix(".weight"))
        packed = None if layer is None else shape_of(layer)
        return stock(model, base_module, base_weight_param_name) if packed is None else torch.Size(packed)

    told: Any = shape
    told.knows_packed_weights = True
    loader: Any = FluxLoraLoaderMixin
    loader._calculate_module_shape = staticmethod(shape)
