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

    def rows(self, which: Tensor | slice) -> GroupSolution:
        """Return a copy of some rows."""
        found = self.patterns[which], self.coefficients[which], self.errors[which]
        return GroupSolution(patterns=found[0].clone(), coefficients=found[1].clone(), errors=found[2].clone())

    def put_(self, which: Tensor, other: GroupSolution) -> None:
        """Replace some rows by those of another solution."""
        self.patterns[which], self.coefficients[which] = other.patterns, other.coefficients
        self.errors[which] = other.errors


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
    now = _refitted(first_patterns(exact, planes), exact, whitener, planes)
    best, left = now.rows(slice(None)), torch.arange(len(exact), device=exact.device)
    for _ in range(steps):
        swept = _swept(now.coefficients, exact, upper)
        new = _better(_refitted(swept.patterns, exact, whitener, planes), swept)
        best.put_(left, _better(new, best.rows(left)))
        # A row that a round does not change stays as it is in all later rounds, because rows do not influence each
        # other. With groups of 64 channels, this is the case for half of the rows after three rounds.
        moves = (new.patterns != now.patterns).any(1) | (new.coefficients != now.coefficients).any(1)
        left, exact, now = left[moves], exact[moves], new.rows(moves)
        if not len(left):
            break
    return best


def _swept(coefficients: Tensor, exact: Tensor, upper: Tensor) -> GroupSolution:
    """Return the patterns of the columns in turn, each the nearest level after the compensation of those before."""
    levels, patterns = levels_of(coefficients).sort(1)
    ends = (levels[:, 1:] + levels[:, :-1]) / 2
    found = torch.empty(exact.shape, dtype=torch.long, device=exact.device)

    def nearest(place: int, columns: Tensor) -> Tensor:
        index = torch.searchsorted(ends, columns[:, place, None].contiguous())
        found[:, place] = index[:, 0]
        return levels.gather(1, index)[:, 0]

    _, errors = sweep(exact, upper, nearest)
    return GroupSolution(patterns=patterns.gather(1, found).to(exact.dtype), coefficients=coefficients, errors=errors)


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
