"""Rotary embeddings in the form of the linear attention kernel: one table of angles per axis of the token grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from postgen.lit.features import exact

if TYPE_CHECKING:
    from postgen.families import Grid
    from postgen.families.attention.reading import Rope

Pairs = tuple[int, int, int]
"""Numbers of channel pairs that are rotated by the frame, the row and the column of a token."""


class SeparableRope:
    """Converts a rotary embedding to tables per axis, if its angles depend on one axis for each channel pair.

    The kernel needs pairs in the order frames, rows, columns. The assignment of pairs to axes depends on the
    architecture and the grid: the first call determines it, later calls reuse it. The angles come from each call.
    Compiled code that meets a new grid does not use the kernel.
    """

    def __init__(self) -> None:
        self._pairs: dict[tuple[int, ...], Pairs | None] = {}

    def table(self, rope: Rope | None, grid: Grid, heads: int = 1) -> tuple[Tensor, Pairs] | None:
        """Return the tables for the kernel, or None if the kernel cannot use this rotary embedding.

        Args:
            rope: the rotary embedding of the tokens; None for none.
            grid: the grid of the tokens.
            heads: number of heads that are merged into one. Merged heads have no contiguous pairs per axis, so only 1
                is supported.

        Returns:
            Cosines and sines of the frames, rows and columns, (T + h + w, D / 2, 2), and the pairs of each axis.
        """
        if rope is None or heads != 1 or rope.cos.shape[0] != 1 or rope.cos.shape[2] != 1:
            return None
        key = (grid.frames, grid.height, grid.width, rope.cos.shape[-1])
        if key not in self._pairs:
            if torch.compiler.is_compiling():
                return None
            self._pairs[key] = _pairs(rope, grid)
        pairs = self._pairs[key]
        if pairs is None:
            return None
        parts = [torch.cat(_axes(exact(table), grid)) for table in (rope.cos, rope.sin)]
        return torch.stack(parts, dim=-1).detach(), pairs


def _axes(table: Tensor, grid: Grid) -> list[Tensor]:
    """Return the rows of a table for the tokens on each axis of the grid through the first token."""
    rows, places = table[0, :, 0], grid.height * grid.width
    return [rows[::places], rows[: places : grid.width], rows[: grid.width]]


def _pairs(rope: Rope, grid: Grid) -> Pairs | None:
    """Return the number of pairs of each axis, or None if a pair depends on several axes or the order differs."""
    axes = torch.zeros(3, rope.cos.shape[-1], dtype=torch.bool)
    for place in range(3):
        shape = [1, 1, 1]
        shape[place] = -1
        fits = torch.ones(rope.cos.shape[-1], dtype=torch.bool)
        for table in (rope.cos, rope.sin):
            along = _axes(table, grid)[place].view(*shape, table.shape[-1])
            whole = table[0, :, 0].view(grid.frames, grid.height, grid.width, -1)
            fits &= (whole == along).flatten(0, 2).all(dim=0).cpu()
        axes[place] = fits
    counts, axis = [0, 0, 0], 0
    for pair in range(axes.shape[1]):
        while axis < 3 and not axes[axis, pair]:
            axis += 1
        if axis == 3:
            return None
        counts[axis] += 1
    return counts[0], counts[1], counts[2]
