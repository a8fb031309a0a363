"""Calls of diffusers and peft that would take the codes of a quantised model for numbers: refused, or made to work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from postgen.errors import UserError
from postgen.families.own_methods import OwnMethod
from postgen.families.quantizer import tell_weight_shapes
from postgen.quant.linear import QLinear


class _FuseLora(OwnMethod):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from postgen.quant.peft_layers import QuantizedLora, cannot_merge

        model = self.model
        # peft would refuse it too, but only after it has fused and scaled the layers before the first quantised one.
        if any(isinstance(each, QuantizedLora) for each in model.modules()):
            raise UserError(cannot_merge(type(model).__name__))
        return type(model).fuse_lora(model, *args, **kwargs)


class _FuseProjections(OwnMethod):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError(
            "the weights of this model are quantised, so the projections of queries, keys and"
            " values cannot be joined: leave fuse_qkv_projections() out. With rounded inputs, they share the rounding"
        )


class _SaveLora(OwnMethod):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        # diffusers calls `to(dtype=None)` here, which it refuses for quantised models.
        model.is_quantized = False
        try:
            return type(model).save_lora_adapter(model, *args, **kwargs)
        finally:
            model.is_quantized = True


METHODS: dict[str, Callable[[nn.Module], OwnMethod]] = {
    "fuse_lora": _FuseLora,
    "fuse_qkv_projections": _FuseProjections,
    "save_lora_adapter": _SaveLora,
}
"""Name of a method of diffusers models -> what quantised models have in its place."""


def guard_quantized_(model: nn.Module) -> None:
    """Give a quantised diffusers model its own versions of `METHODS`, as far as its class has them."""
    for name, make in METHODS.items():
        if hasattr(type(model), name):
            setattr(model, name, make(model))
    tell_weight_shapes(model, _packed_shape)


def unguard_(model: nn.Module) -> None:
    """Give a model that is no longer quantised the methods of its class again."""
    for name in METHODS:
        if isinstance(vars(model).get(name), (_FuseLora, _FuseProjections, _SaveLora)):
            delattr(model, name)


def _packed_shape(layer: nn.Module) -> tuple[int, int] | None:
    return (layer.out_features, layer.in_features) if isinstance(layer, QLinear) else None


def _note_base(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if name == "base_layer" and isinstance(child, QLinear) and child.spec.weight is not None:
        from postgen.quant.peft_layers import wrap

        wrap(parent)


# torch calls this for each module that gets a submodule: the one place that every way into peft passes.
register_module_module_registration_hook(_note_base)
