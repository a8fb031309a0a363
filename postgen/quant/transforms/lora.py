"""LoRA files for a model, applied to the same model after folds.

A LoRA adds B A x to the output of a layer. After folds, the layer reads x' = (x - d) / s, and the tensor that it
writes is divided by t: the same change is

    (B / t) (A s) x' + (B / t) A d

with a bias of the LoRA for the shift. `pipe.load_lora_weights` and `transformer.load_lora_adapter` do this for every
LoRA on a model with folds. A LoRA that is trained on the folded model needs nothing: its `peft.LoraConfig` contains a
mark of the folds (`postgen.families.lora_guard`), with which `save_lora_adapter`, `postgen train` and scripts that
write the metadata of the adapter save it. Without this metadata, a LoRA counts as one for the model before the folds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import blocks_of
from postgen.families.folds import Modulation
from postgen.families.installed import inner_model
from postgen.families.lora_guard import guard_loras
from postgen.quant.rotation import rotated
from postgen.quant.transforms.points import FoldPoint
from postgen.quant.transforms.records import recorded


def fold_adapter_(model: nn.Module, name: str) -> None:
    """Change a loaded adapter, made for the model before its folds, so that it fits the folded model.

    Args:
        model: the folded model.
        name: name of the adapter of peft.

    Raises:
        UserError: the adapter changes a folded layer otherwise than by a plain LoRA. Nothing changes.
    """
    modules = dict(model.named_modules())
    found: list[tuple[Any, dict[str, Tensor]]] = []
    for layer, changes in _folded(model).items():
        wrapper: Any = modules.get(layer)
        if name not in getattr(wrapper, "lora_A", ()):
            continue
        if wrapper.use_dora.get(name):
            raise UserError(f"{layer} is folded, and the magnitudes of this LoRA (DoRA) cannot be folded")
        parts = {"A.weight": wrapper.lora_A[name].weight, "B.weight": wrapper.lora_B[name].weight}
        if wrapper.lora_B[name].bias is not None:
            parts["B.bias"] = wrapper.lora_B[name].bias
        found.append((wrapper, _changed({key: value.detach() for key, value in parts.items()}, changes)))
    if any("B.bias" in changed for _, changed in found):
        _give_biases(model, name)
    for wrapper, changed in found:
        up = wrapper.lora_B[name]
        wrapper.lora_A[name].weight.data.copy_(changed["A.weight"])
        up.weight.data.copy_(changed["B.weight"])
        if "B.bias" in changed:
            up.bias.data.copy_(changed["B.bias"])


def _give_biases(model: Any, name: str) -> None:
    """Give an adapter biases of 0 on all layers: files of peft have biases on all layers or on none."""
    for module in model.modules():
        wrapper: Any = module
        if name not in getattr(module, "lora_B", ()) or wrapper.lora_B[name].bias is not None:
            continue
        up = wrapper.lora_B[name]
        up.bias = nn.Parameter(up.weight.new_zeros(len(up.weight)), requires_grad=up.weight.requires_grad)
        wrapper.lora_bias[name] = True
    model.peft_config[name].lora_bias = True


def guard_folds_(model: nn.Module) -> None:
    """Make LoRA loaders of a model know its folds, see the module docstring."""
    guard_loras(inner_model(model), fold_adapter_, _mark)


def _mark(model: nn.Module) -> str:
    """Return a text that identifies the folds of a model; empty without folds."""
    digest = hashlib.sha256()
    found = [(block.name, *each) for block in blocks_of(model) for each in recorded(block.module)]
    for name, point, record in found:
        digest.update(f"{name} {point.name}".encode())
        digest.update(record.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16] if found else ""


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
