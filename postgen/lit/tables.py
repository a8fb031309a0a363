"""The rotation of a grid's tokens as the kernel of linear attention takes it: angles per axis, found once per grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from postgen.lit.features import exact

if TYPE_CHECKING:
    from postgen.families import Grid
    from postgen.families.attention.reading import Rope

Pairs = tuple[int, int, int]
"""How many channel pairs turn with the frame, the row and the column."""


class SeparableRope:
    """Tells whether every channel pair turns with one axis of the grid alone, in the order frames, rows, columns.

    Which pair turns with which axis is a matter of the architecture and the grid: it is found in the first call and
    kept. The angles are taken from each call. Compiled code that meets a new grid goes without the kernel.
    """

    def __init__(self) -> None:
        self._pairs: dict[tuple[int, ...], Pairs | None] = {}

    def table(self, rope: Rope | None, grid: Grid, heads: int = 1) -> tuple[Tensor, Pairs] | None:
        """Return (T + h + w, D / 2, 2) and the pairs of each axis, as the kernel takes them; None: it cannot.

        Args:
            rope: of the tokens; None rotates nothing.
            grid: of them.
            heads: heads that are merged: their channels are no contiguous pairs of one axis.
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
    """Rows of a table at the tokens along each axis that begin at the first token."""
    rows, places = table[0, :, 0], grid.height * grid.width
    return [rows[::places], rows[: places : grid.width], rows[: grid.width]]


def _pairs(rope: Rope, grid: Grid) -> Pairs | None:
    """How many pairs turn with each axis; None where one turns with several, or they are in another order."""
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
