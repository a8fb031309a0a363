"""LoRA files for a model, applied to the same model after folds.

A LoRA adds B A x to the output of a layer. After folds, the layer reads x' = (x - d) / s, and the tensor that it
writes is divided by t: the same change is

    (B / t) (A s) x' + (B / t) A d

with a bias of the LoRA for the shift. Without this step, a LoRA that was trained before the folds changes the model
wrongly. A LoRA that is trained on the folded model needs nothing.

    state, alphas = pipe.lora_state_dict("style.safetensors", return_alphas=True)
    pipe.load_lora_weights(fold_lora(pipe.transformer, state))
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.families.folds import Modulation
from postgen.quant.rotation import rotated
from postgen.quant.transforms.points import FoldPoint
from postgen.quant.transforms.records import recorded

_PART = re.compile(r"(?P<layer>.+)\.lora_(?P<half>[AB])\.(?P<what>weight|bias)")


def fold_lora(model: nn.Module, state: Mapping[str, Tensor], *, prefix: str = "transformer.") -> dict[str, Tensor]:
    """Return a LoRA that changes a folded model as the given one changes the model before its folds.

    Args:
        model: the folded model, quantised or not.
        state: the LoRA in the keys of peft, PREFIX + LAYER + ".lora_A.weight". Other components' keys are kept.
        prefix: what stands before the names of the model's layers.

    Raises:
        UserError: a folded layer has other tensors than those of a LoRA (magnitudes, differences of weights).
    """
    layers: dict[str, dict[str, Tensor]] = {}
    kept: dict[str, Tensor] = {}
    folded = _folded(model)
    for key, tensor in state.items():
        match = _PART.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
        place = key.removeprefix(prefix)
        if match and match["layer"] in folded:
            layers.setdefault(match["layer"], {})[f"{match['half']}.{match['what']}"] = tensor
        elif key.startswith(prefix) and any(place.startswith(f"{each}.") and "alpha" not in place for each in folded):
            raise UserError(f"{key} of this LoRA changes a layer with folds, and only lora_A and lora_B can be folded")
        else:
            kept[key] = tensor
    for layer, parts in layers.items():
        if "A.weight" not in parts or "B.weight" not in parts:
            raise UserError(f"the LoRA lacks a half of {layer}: it needs lora_A.weight and lora_B.weight")
        changed = _changed(parts, folded[layer])
        kept |= {f"{prefix}{layer}.lora_{name}": tensor for name, tensor in changed.items()}
    return _with_biases(kept, prefix)


_Change = tuple[FoldPoint, Tensor, str]
"""A point, its record, and the name of a layer inside the block."""


def _folded(model: nn.Module) -> dict[str, list[_Change]]:
    """Return full name of a layer -> the folds that change what it reads or writes."""
    found: dict[str, list[_Change]] = {}
    for block in blocks_of(model):
        for point, record in recorded(block.module):
            names = {part.name for part in (*point.readers, *point.writers)}
            names |= {writer.linear for writer in point.fold.writers if isinstance(writer, Modulation)}
            for name in names:
                found.setdefault(f"{block.name}.{name}", []).append((point, record, name))
    return found


def _changed(parts: Mapping[str, Tensor], changes: list[_Change]) -> dict[str, Tensor]:
    down, up = parts["A.weight"], parts["B.weight"]
    a, b = down.float().clone(), up.float().clone()
    constant = torch.zeros(a.shape[0], device=a.device)
    bias = parts["B.bias"].float().clone() if "B.bias" in parts else torch.zeros(b.shape[0], device=b.device)
    for point, record, name in changes:
        scale, shift, turn = record.to(a.device)
        for part in point.readers:
            if part.name == name:
                columns = a[:, part.start : part.stop]
                constant += columns @ shift
                columns *= scale
                columns.copy_(_turned(columns, turn))
    bias += b @ constant
    for point, record, name in changes:
        scale, _, turn = record.to(b.device)
        for rows, factor in _rows(point, name, scale):
            for values in (b, bias[:, None]):
                values[rows] /= factor[:, None]
                values[rows] = _turned(values[rows].T, turn).T
    found = {"A.weight": a.to(down.dtype), "B.weight": b.to(up.dtype)}
    return found | ({"B.bias": bias.to(up.dtype)} if bool(bias.any()) or "B.bias" in parts else {})


def _rows(point: FoldPoint, name: str, scale: Tensor) -> list[tuple[slice, Tensor]]:
    """Return the rows of a layer's output that a fold divides, and by what."""
    width = point.width
    found = [
        (slice(part.start, part.stop), 1 / scale if part.inverse else scale)
        for part in point.writers
        if part.name == name
    ]
    for writer in point.fold.writers:
        if isinstance(writer, Modulation) and writer.linear == name:
            chunks = [chunk for chunk in (writer.scale, writer.shift) if chunk is not None]
            found += [(slice(chunk * width, (chunk + 1) * width), scale) for chunk in chunks]
    return found


def _turned(values: Tensor, turn: Tensor) -> Tensor:
    """Return numbers (..., C) after the rotation of a record."""
    size = int(turn.abs().amax())
    return rotated(values, size, turn.sign()) if size else values


def _with_biases(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Give every lora_B of the model a bias if one has one: an adapter of peft has biases on all layers or on none."""
    ups = [key for key in state if key.startswith(prefix) and key.endswith(".lora_B.weight")]
    if any(f"{key.removesuffix('weight')}bias" in state for key in ups):
        for key in ups:
            name = f"{key.removesuffix('weight')}bias"
            state.setdefault(name, torch.zeros_like(state[key][:, 0]))
    return state
