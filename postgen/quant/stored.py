"""Quantised layers as JSON values in the config of a model, and empty layers made from them.

Layers that are quantised alike form a group: formats, sizes, which tensors they have, and the names of the layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from postgen.errors import UserError, shown
from postgen.quant.formats import format_of
from postgen.quant.linear import QLinear
from postgen.quant.spec import KEYS, LayerSpec

NAMES = "names"
"""Key of the names of the layers of a group."""
FLOAT_ZERO = "float_zero"
"""Key that says whether zero points are stored as float32 (int32 views), because some are no bytes."""


def groups_of(layers: Mapping[str, QLinear]) -> list[dict[str, Any]]:
    """Return the groups of quantised layers, in the order of their first layers."""
    groups: list[dict[str, Any]] = []
    for name, layer in layers.items():
        said = _described(layer)
        alike = next((group for group in groups if {**group, NAMES: None} == {**said, NAMES: None}), None)
        if alike is None:
            alike = {**said, NAMES: []}
            groups.append(alike)
        alike[NAMES].append(name)
    return groups


def put_layers_(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> dict[str, QLinear]:
    """Replace the linear layers that groups name by quantised layers without values, on the device of their weights.

    Returns:
        The new layers by name.

    Raises:
        UserError: a group is not understood, or the model has no such layer.
    """
    found: dict[str, QLinear] = {}
    known = dict(model.named_modules())
    for group in groups:
        words, spec = _read(group)
        for name in group[NAMES]:
            linear = known.get(name)
            if not isinstance(linear, nn.Linear):
                raise UserError(
                    f"the checkpoint has quantised weights for {shown(name)}, but {type(model).__name__} has no such"
                    " linear layer: its config and its weights are of different models"
                )
            new = QLinear(
                linear.in_features, linear.out_features, spec, device=linear.weight.device, dtype=linear.weight.dtype,
                **words,
            )  # fmt: skip
            if group[FLOAT_ZERO] and new.weight_zero is not None:
                new.weight_zero = torch.empty_like(new.weight_zero, dtype=torch.int32)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
            found[name] = new
    return found


def _described(layer: QLinear) -> dict[str, Any]:
    spec = layer.spec
    return {
        "weight": None if spec.weight is None else spec.weight.text,
        "act": None if spec.act is None else spec.act.text,
        "rotate": spec.rotate,
        "rank": spec.rank,
        "bias": layer.bias is not None,
        "input_scale": layer.input_scale is not None,
        "signs": layer.signs is not None,
        "clips": 0 if layer.act_clip is None else len(layer.act_clip),
        # Without a dtype, diffusers casts a tensor to the dtype that the empty layer has.
        FLOAT_ZERO: layer.weight_zero is not None and layer.weight_zero.dtype == torch.int32,
    }


def _read(group: Any) -> tuple[dict[str, Any], LayerSpec]:
    words = ("bias", "input_scale", "signs", "clips")
    keys = {*KEYS, *words, NAMES, FLOAT_ZERO}
    if not isinstance(group, Mapping) or group.keys() != keys or not isinstance(group[NAMES], list):
        raise UserError(
            f"a group of quantised layers in the config must have {', '.join(sorted(keys))}, got"
            f" {shown(group)}: the checkpoint was written by another version of postgen"
        )
    formats = {key: None if group[key] is None else format_of(group[key]) for key in ("weight", "act")}
    spec = LayerSpec(**formats, rotate=group["rotate"], rank=group["rank"])
    return {key: group[key] for key in words}, spec
