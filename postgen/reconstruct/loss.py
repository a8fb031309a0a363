"""Losses and errors between the outputs of a student and its teacher.

For each row of the batch, with the teacher's output o, the difference d = student - o, and the mean m of o over the
tokens:

    centred_l1   sum |d| / sum |o - m|          centred_l2   sum d^2 / sum (o - m)^2
    relative_l1  sum |d| / sum |o|              relative_l2  sum d^2 / sum o^2
    mse          mean d^2

Attention over many tokens has almost the same output for all of them. An error that is small relative to o can then
still be as large as the differences between tokens. The centred losses are therefore relative to o - m. All losses
include an error of the mean. Outputs are (B, tokens ..., channels). For outputs without tokens, (B, channels), m is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from postgen.errors import UserError

Loss = Literal["centred_l1", "centred_l2", "relative_l1", "relative_l2", "mse"]


def distance(kind: Loss, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Return a loss, averaged over rows and over outputs (such as the video and text outputs of a block).

    Args:
        kind: the loss.
        outputs: outputs of the student, each (B, tokens ..., channels).
        targets: outputs of the teacher, with the same shapes.

    Raises:
        UserError: outputs and targets differ in number or shape; broadcasting could hide this.
    """
    shapes = [[tuple(tensor.shape) for tensor in side] for side in (outputs, targets)]
    if shapes[0] != shapes[1] or not targets:
        raise UserError(
            f"the outputs of the student have the shapes {shapes[0]}, those of the teacher {shapes[1]}: they must be"
            " equal"
        )
    each = [_rows(kind, *map(_exact, pair)).mean() for pair in zip(outputs, targets, strict=True)]
    return torch.stack(each).mean()


def error(kind: Literal["l1", "l2"], outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Return the relative error |d| / |o - m| in the L1 or L2 norm, averaged over rows and outputs; 0 means equal."""
    each = [_rows(f"centred_{kind}", *map(_exact, pair)) for pair in zip(outputs, targets, strict=True)]
    return torch.stack([(rows.sqrt() if kind == "l2" else rows).mean() for rows in each]).mean()


def _rows(kind: str, output: Tensor, target: Tensor) -> Tensor:
    """Return the loss of each row, (B,). L2 losses stay squared, because a square root has no gradient at 0."""
    difference, power = (output - target).flatten(1), 2 if kind.endswith("l2") else 1
    if kind == "mse":
        return difference.square().mean(1)
    tokens = tuple(range(1, target.dim() - 1))
    against = target - target.mean(tokens, keepdim=True) if kind.startswith("centred") and tokens else target
    far, whole = (side.abs().pow(power).sum(1) for side in (difference, against.flatten(1)))
    # If the teacher's output is the same for all tokens, the divisor is 0: the loss is then infinite, which ends the
    # run, unless the student is exactly equal, which gives 0.
    return far / torch.where((far == 0) & (whole == 0), 1, whole)


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
