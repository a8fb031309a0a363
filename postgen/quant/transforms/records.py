"""The record of the folds of a block, which a LoRA for the model before the folds needs.

Each point of the block has a buffer of the bits of float32 numbers (3, C): the scale and the shift of all its folds
together, and the rotation of the values after them (the signs times the block size; 0: none).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from postgen.quant.transforms.points import FoldPoint, points_in

RECORD = "fold_"
"""Beginning of the buffers' names, before the name of the point: "fold_attn1_input"."""


def prepare_records_(block: nn.Module) -> None:
    """Register the records of all points of a block, without any fold."""
    for point in points_in(block):
        name = _name(point)
        if name not in dict(block.named_buffers(recurse=False)):
            device = next(block.parameters()).device
            values = torch.zeros(3, point.width, dtype=torch.float32, device=device)
            values[0] = 1
            block.register_buffer(name, values.view(torch.int32))


def record_of(block: nn.Module, point: FoldPoint) -> Tensor:
    """Return the record of a point after `prepare_records_`, float32 (3, C); changes in place change the block."""
    found: Tensor = block.get_buffer(_name(point))
    return found.view(torch.float32)


def note_(block: nn.Module, point: FoldPoint, scale: Tensor, shift: Tensor) -> None:
    """Add a fold to the record of a point: (x - d) / s after (x - d0) / s0 is (x - d0 - s0 d) / (s0 s)."""
    prepare_records_(block)
    record = record_of(block, point)
    record[1] += record[0] * shift.to(record)
    record[0] *= scale.to(record)


def note_rotation_(block: nn.Module, point: FoldPoint, size: int, signs: Tensor | None) -> None:
    """Add a rotation of values to the record of their point."""
    prepare_records_(block)
    record = record_of(block, point)
    record[2] = size * (torch.ones(point.width) if signs is None else signs).to(record)


def is_rotated(block: nn.Module, point: FoldPoint) -> bool:
    """Whether the values of a point are rotated in the weights."""
    return _name(point) in dict(block.named_buffers(recurse=False)) and bool(record_of(block, point)[2].any())


def recorded(block: nn.Module) -> list[tuple[FoldPoint, Tensor]]:
    """Return the points of a block that were folded or rotated, with their records."""
    own = dict(block.named_buffers(recurse=False))
    found = [(point, record_of(block, point)) for point in points_in(block) if _name(point) in own]
    return [(point, record) for point, record in found if bool((record[0] != 1).any() or record[1:].any())]


def _name(point: FoldPoint) -> str:
    return RECORD + point.name.replace(".", "_")
