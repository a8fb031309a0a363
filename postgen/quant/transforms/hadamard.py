"""Rotations that cost nothing at inference, and the signs of those that do.

`postgen.quant.rotation` rotates the input of a layer in every call. The values of attention can be rotated offline
instead: attention mixes tokens and not the channels of a head, so a rotation of the channels inside each head can be
folded into the rows of the value projection and the columns of the output projection (SpinQuant's R2,
arXiv:2405.16406).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.quant.rotation import rotated
from postgen.quant.transforms.points import FoldPoint, block_of
from postgen.quant.transforms.records import is_rotated, note_rotation_


def random_signs(channels: int, seed: int = 0) -> Tensor:
    """Return the signs of a randomised Hadamard rotation, (channels,) of +1 and -1, int8; a seed determines them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (channels,), generator=generator, dtype=torch.int8) * 2 - 1


@torch.no_grad()
def rotate_values_(model: nn.Module, point: FoldPoint, size: int = 0, signs: Tensor | None = None) -> None:
    """Rotate the values of attention inside each head, in the weights; the output of the model stays.

    Args:
        model: the model or block of the point.
        point: a point of the kind "value".
        size: channels that are rotated together, a power of two that divides the channels of a head; 0: the largest.
        signs: (C,) of +1 and -1, by which the channels are multiplied first; None: all are +1.

    Raises:
        UserError: the point has other tensors, the size does not divide a head, or the values are rotated already.
            Nothing changes.
    """
    where = f"{point.name} of {point.block or 'the block'}"
    if point.kind != "value":
        raise UserError(f"{where} cannot be rotated in the weights: only the values of attention can")
    block = block_of(model, point.block)
    if is_rotated(block, point):
        raise UserError(f"{where} is rotated already")
    attention: Any = block.get_submodule(point.writers[0].name.rpartition(".")[0])
    head = point.width // _heads(attention)
    size = size or head & -head
    if head % size or size & (size - 1):
        raise UserError(
            f"size is {size}, but a head of {where} has {head} channels: use a power of two that divides it"
        )
    for parts, axis in ((point.readers, 1), (point.writers, 0)):
        for part in parts:
            layer: Any = block.get_submodule(part.name)
            own = None if signs is None else signs.to(layer.weight.device)
            inside = layer.weight.data.narrow(axis, part.start, part.stop - part.start)
            turned = rotated(inside, size, own) if axis else rotated(inside.T, size, own).T
            inside.copy_(turned)
            if axis == 0 and layer.bias is not None:
                moved = layer.bias.data[part.start : part.stop]
                moved.copy_(rotated(moved, size, own))
    note_rotation_(block, point, size, signs)


def _heads(attention: Any) -> int:
    found = getattr(attention, "heads", None) or getattr(attention, "num_heads", None)
    if not found:
        raise UserError(f"{type(attention).__name__} does not say how many heads it has, so its values stay unrotated")
    return int(found)
