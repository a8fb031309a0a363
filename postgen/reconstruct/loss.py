"""How far what a student gives is from what its teacher gave.

With o the teacher's output, d = student - o and m the mean of o over its tokens, for each row of the batch:

    centred_l1   sum |d| / sum |o - m|          centred_l2   sum d^2 / sum (o - m)^2
    relative_l1  sum |d| / sum |o|              relative_l2  sum d^2 / sum o^2
    mse          mean d^2

Attention over many tokens gives almost the same output everywhere, so that an error that is small beside o may still
be all that tells tokens apart: the centred ones are relative to what is left without the mean. A wrong mean counts in
all of them. Outputs are (B, tokens ..., channels); those without tokens, (B, channels), have no mean taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from postgen.errors import UserError

Loss = Literal["centred_l1", "centred_l2", "relative_l1", "relative_l2", "mse"]


def check_teacher(latents: Tensor, prompts: Sequence[int]) -> None:
    """Refuse latents that a teacher drew and that hold NaN or infinity: nothing can be learnt from them.

    Args:
        latents: (prompts, ...), floating.
        prompts: their numbers, for the error.

    Raises:
        UserError: some are not finite.
    """
    bad = [prompt for prompt, row in zip(prompts, latents, strict=True) if not row.isfinite().all()]
    if bad:
        raise UserError(
            f"the teacher's own latents are not finite for prompt {bad[0]} (counted from 0)"
            f"{f' and {len(bad) - 1} more' if len(bad) > 1 else ''}: it overflows in its dtype, or its weights are"
            " damaged. See what `postgen generate` makes of that prompt, and load it in bfloat16 or float32"
        )


def distance(kind: Loss, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Return a loss, the mean over rows and over outputs (video and text of a block with two streams, say).

    Args:
        kind: which one.
        outputs: of the student, (B, tokens ..., channels) each.
        targets: of the teacher, of the same shapes.

    Raises:
        UserError: the two differ in number or shape, which broadcasting might hide.
    """
    shapes = [[tuple(tensor.shape) for tensor in side] for side in (outputs, targets)]
    if shapes[0] != shapes[1] or not targets:
        raise UserError(f"a student returned the shapes {shapes[0]}, its teacher {shapes[1]}: they must be the same")
    each = [_rows(kind, *map(_exact, pair)).mean() for pair in zip(outputs, targets, strict=True)]
    return torch.stack(each).mean()


def error(kind: Literal["l1", "l2"], outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Return the relative error |d| / |o - m| in the L1 or L2 norm, the mean over rows and outputs; 0 is equal."""
    each = [_rows(f"centred_{kind}", *map(_exact, pair)) for pair in zip(outputs, targets, strict=True)]
    return torch.stack([(rows.sqrt() if kind == "l2" else rows).mean() for rows in each]).mean()


def _rows(kind: str, output: Tensor, target: Tensor) -> Tensor:
    """Return the loss of each row, (B,). L2 stays squared: a root has no gradient where student and teacher agree."""
    difference, power = (output - target).flatten(1), 2 if kind.endswith("l2") else 1
    if kind == "mse":
        return difference.square().mean(1)
    tokens = tuple(range(1, target.dim() - 1))
    against = target - target.mean(tokens, keepdim=True) if kind.startswith("centred") and tokens else target
    far, whole = (side.abs().pow(power).sum(1) for side in (difference, against.flatten(1)))
    # A teacher that gives the same everywhere leaves nothing to compare with: any difference is then infinite, which
    # ends the run, and none is 0.
    return far / torch.where((far == 0) & (whole == 0), 1, whole)


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
