"""Weighted sums of tensors: one arithmetic for merges at the end of a run, rescues, and merges of files.

The sum is computed in float32 (float64 if a tensor is), as one tensor plus weighted differences from it, and rounded
once to the dtype of the result. So the same checkpoints and weights have the same merge, bit by bit, wherever it is
computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from postgen.errors import UserError


def working_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype of the calculation for tensors of some dtypes."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


@torch.no_grad()
def combined(values: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Return the sum of tensors times factors, without rounding what is equal in all of them.

    If the factors have the sum 1, the sum is computed as the first tensor plus factors times differences from it.
    Tensors that are equal in all sources are then unchanged, and close tensors lose no digits.

    Args:
        values: tensors of one shape and one floating-point dtype, which is that of the calculation.
        factors: one for each tensor. Tensors with factor 0 are not used.

    Raises:
        UserError: all factors are 0, so that no tensor is used.
    """
    used = [(value, factor) for value, factor in zip(values, factors, strict=True) if factor]
    if not used:
        raise UserError("all factors of the merge are 0: nothing would remain")
    anchor, first = used[0]
    if len(used) == 1 and first == 1:
        return anchor
    affine = abs(math.fsum(factors) - 1) < 1e-9
    total = anchor.clone() if affine else anchor * first
    for value, factor in used[1:]:
        # A product and a sum, each rounded once: the fused operation would depend on the position in a block.
        total += (value - anchor if affine else value) * factor
    return total


def finite_sum(name: str, values: Sequence[Tensor], factors: Sequence[float], labels: Sequence[str]) -> Tensor:
    """Return `combined`; infinite values that are equal in all tensors are kept.

    Args:
        name: name of the tensors, for messages.
        values: as in `combined`.
        factors: as in `combined`.
        labels: origin of each tensor, for messages.

    Raises:
        UserError: a tensor holds NaN, or infinite values differ, or all factors are 0.
    """
    if all(map(is_finite, values)):
        return combined(values, factors)
    for value, label in zip(values, labels, strict=True):
        if bool(value.isnan().any()):
            raise UserError(f"{label} holds NaN in {name}: it is damaged, leave it out")
    if not all(torch.equal(value, values[0]) for value in values):
        raise UserError(f"{name} holds infinite values that differ between the sources: they have no mean")
    return values[0]


def is_finite(values: Tensor) -> bool:
    """Return whether all values are finite numbers."""
    # A sum is several times faster than `isfinite`, and is not finite if a value is not. It may also overflow.
    return math.isfinite(values.sum(dtype=torch.float64 if values.itemsize == 8 else torch.float32)) or bool(
        torch.isfinite(values).all()
    )
