"""BPDQ: bit planes with coefficients that are fitted to the error of the layer's output (arXiv:2602.04163).

The groups of a weight are quantised in turn. For the columns W of a group, as compensated so far, and the part U of
the factor that belongs to them, patterns B and coefficients c are found in rounds:

    c = argmin ||(W - Q(B, c)) U^-1||^2         for each row, with a small ridge
    B: the columns in turn, the nearest level; the error is compensated by the later columns of the group

With E = (W - Q) U^-1, later columns are compensated as in GPTQ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from postgen.quant.formats import Format
from postgen.quant.hessian import Hessian
from postgen.quant.rounding import Quantized, Scales, levels_of
from postgen.quant.solvers.compensation import inverse, ordering, sweep
from postgen.quant.solvers.planes import RIDGE, design, first_patterns, fitted, stored
from postgen.settings import Part


@dataclass(kw_only=True)
class BpdqOptions(Part):
    """Options of the solver "bpdq"."""

    steps: int = 10
    """Rounds of patterns and coefficients for each group. Each row keeps its best round."""
    order: Literal["none", "groups"] = "groups"
    """Order of the groups: as they are, or with the largest inputs first. Use "none" with a rotation, which makes all
    inputs alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_in((1, 1000), "steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSolution:
    """Result of `solve_group`."""

    patterns: Tensor
    """Patterns 0 ... 2^k - 1, float32 (N, G)."""
    coefficients: Tensor
    """Coefficients, the constant first, float32 (N, k + 1); bfloat16 numbers."""
    errors: Tensor
    """E (N, G), with E U = W - Q."""


def bpdq(weight: Tensor, format: Format, hessian: Hessian, options: BpdqOptions) -> Quantized:
    """Quantise a weight to bit planes so that the squared error of the layer's output is small.

    The published code keeps the round that is best over all rows together; here each row keeps its own, which is never
    worse, because rows do not influence each other.
    """
    size, rows = format.group(weight.shape[1]), len(weight)
    order = ordering(hessian, options.order, size)
    upper = (hessian if options.order == "none" else hessian.reordered(order)).upper
    now = weight.float()[:, order]
    patterns, coefficients = torch.empty_like(now), now.new_empty(rows, now.shape[1] // size, format.planes + 1)
    for first in range(0, now.shape[1], size):
        last = first + size
        found = solve_group(now[:, first:last], upper[first:last, first:last], format.planes, options.steps)
        patterns[:, first:last] = found.patterns
        coefficients[:, first // size] = found.coefficients
        now[:, last:] -= found.errors @ upper[first:last, last:]
    groups = order[::size] // size
    return Quantized(
        values=patterns[:, inverse(order)].reshape(rows, -1, size),
        scales=Scales(scale=coefficients[:, inverse(groups)]),
        format=format,
        shape=tuple(weight.shape),
    )


def solve_group(exact: Tensor, upper: Tensor, planes: int, steps: int) -> GroupSolution:
    """Find patterns and coefficients of one group.

    Args:
        exact: the columns W (N, G), float32.
        upper: the part of U that belongs to them (G, G).
        planes: number k of planes.
        steps: number of rounds.
    """
    eye = torch.eye(len(upper), dtype=torch.float64, device=upper.device)
    whitener = torch.linalg.solve_triangular(upper.double(), eye, upper=True).float()
    best = now = _refitted(first_patterns(exact, planes), exact, whitener, planes)
    for _ in range(steps):
        levels = levels_of(now.coefficients)
        patterns = torch.empty_like(exact)

        def nearest(place: int, columns: Tensor, levels: Tensor = levels, patterns: Tensor = patterns) -> Tensor:
            index = (columns[:, place, None] - levels).abs().argmin(1, keepdim=True)
            patterns[:, place] = index[:, 0]
            return levels.gather(1, index)[:, 0]

        _, errors = sweep(exact, upper, nearest)
        swept = GroupSolution(patterns=patterns, coefficients=now.coefficients, errors=errors)
        now = _better(_refitted(patterns, exact, whitener, planes), swept)
        best = _better(now, best)
    return best


def _refitted(patterns: Tensor, exact: Tensor, whitener: Tensor, planes: int) -> GroupSolution:
    """Return the best coefficients of given patterns, and the errors that they leave; `whitener` is U^-1.

    (The published code changes the errors by those of the difference of the old and the new numbers. The result is the
    same, because the errors are a linear function of the numbers.)
    """
    columns = torch.einsum("ngc,gh->nhc", design(patterns, planes), whitener)
    target = exact @ whitener
    # The ridge is relative to the size of the inputs of the group, so that it does not shrink the weights of channels
    # that are almost always 0.
    coefficients = stored(fitted(columns, target, RIDGE * whitener.square().sum() / len(whitener)))
    errors = target - torch.einsum("nhc,nc->nh", columns, coefficients)
    return GroupSolution(patterns=patterns, coefficients=coefficients, errors=errors)


def _better(new: GroupSolution, old: GroupSolution) -> GroupSolution:
    """Return the solution with the smaller error, row by row."""
    wins = new.errors.square().sum(1, keepdim=True) < old.errors.square().sum(1, keepdim=True)
    return GroupSolution(
        patterns=torch.where(wins, new.patterns, old.patterns),
        coefficients=torch.where(wins, new.coefficients, old.coefficients),
        errors=torch.where(wins, new.errors, old.errors),
    )
