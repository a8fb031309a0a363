"""`chunk`: softmax within a chunk of frames and a few before it, linear attention to the other frames (ReHyAt,
arXiv:2601.04342).

As `anchor` with other sets: T_S are the frames of the query's chunk, `overlap` frames before it and all of the text;
T_L are the frames before those and, unless it is causal, those after. A chunk of everything is softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from postgen.lit.features import exact, joined, no_autocast, rotate_both
from postgen.lit.layers.anchor import Hybrid, attend
from postgen.lit.layers.base import State, check_pushed, softmax_flops

if TYPE_CHECKING:
    from postgen.families import Grid
    from postgen.lit.options import ChunkOptions
    from postgen.lit.tokens import Tokens


class Chunk(Hybrid):
    """A hybrid of frames."""

    kind = "chunk"
    options: ChunkOptions

    def covers(self, grid: Grid) -> bool:
        """Whether the first chunk is the whole clip."""
        return self.options.frames >= grid.frames

    def forward(self, tokens: Tokens) -> Tensor:
        """Return the video's rows."""
        return self._rows(tokens, None)[0]

    def stream(self, tokens: Tokens, state: State | None) -> tuple[Tensor, State]:
        """Return the rows of the next frames: whole chunks but for the last piece of a stream.

        Kept are the sums over all frames but the last `overlap`, and these frames.
        """
        if not self.options.causal:
            return super().stream(tokens, state)
        pushed = check_pushed(state, self.options.frames) + tokens.grid.frames
        out, found = self._rows(tokens, state)
        return out, {**found, "pushed": torch.tensor(pushed)}

    def flops(self, grid: Grid, text: int) -> int:
        """Return the FLOPs of a call of one sample."""
        places = grid.height * grid.width
        pairs = sum((stop - first) * (stop - low) for first, stop, low in self._chunks(grid.frames))
        return (
            4 * pairs * places**2 * self.shape.heads * self.shape.channels
            + softmax_flops(grid.tokens, text, self.shape)
            + softmax_flops(text, grid.tokens + text, self.shape)
            + self.linear_flops(grid)
        )

    def _chunks(self, frames: int, kept: int = 0) -> Iterator[tuple[int, int, int]]:
        """First frame, the one after the last, and the first that softmax sees, which counts kept frames too."""
        for first in range(0, frames, self.options.frames):
            yield first, min(first + self.options.frames, frames), max(0, first + kept - self.options.overlap)

    def _rows(self, tokens: Tokens, state: State | None) -> tuple[Tensor, State]:
        grid, rope = tokens.grid, tokens.rope
        places, overlap = grid.height * grid.width, self.options.overlap
        query, key, value = tokens.softmax_parts()
        normed_query, normed_key = tokens.normed()
        q, k = self.map_query(normed_query), self.map_key(normed_key)
        turned_query, turned_key = rotate_both(q, k, rope)
        turned, v = (x.unflatten(1, (grid.frames, -1)) for x in (turned_key, exact(value)))
        with no_autocast(v):
            sums = torch.einsum("bfshd,bfshe->bfhde", turned, v)
        key_sums = k.unflatten(1, (grid.frames, -1)).sum(dim=2)
        # Frames of earlier pieces that softmax still sees stand in front; what was before them is in the sums.
        kept = 0 if state is None else state["sums"].shape[1]
        if state is not None:
            sums, key_sums = torch.cat([state["sums"], sums], dim=1), torch.cat([state["key_sums"], key_sums], dim=1)
            key, value = torch.cat([state["key"], key], dim=1), torch.cat([state["value"], value], dim=1)
        past = (0, 0) if state is None else (state["past"], state["key_past"])
        parts = []
        for first, stop, low in self._chunks(grid.frames, kept):
            rows, near = slice(first * places, stop * places), slice(low * places, (stop + kept) * places)
            soft, lse = attend(tokens, query[:, rows], key[:, near], value[:, near])
            far = self._far(sums, low, stop + kept) + past[0]
            far_keys = self._far(key_sums, low, stop + kept) + past[1]
            with no_autocast(v):
                numerator = torch.einsum("bnhd,bhde->bnhe", turned_query[:, rows], far)
                divisor = torch.einsum("bnhd,bhd->bnh", q[:, rows], far_keys)
            parts.append(joined(soft, lse, numerator, divisor).to(value.dtype))
        last = max(0, sums.shape[1] - overlap)
        return torch.cat(parts, dim=1), {
            "past": past[0] + sums[:, :last].sum(dim=1),
            "key_past": past[1] + key_sums[:, :last].sum(dim=1),
            # Copies: a view would hold all that came before.
            "sums": sums[:, last:].clone(),
            "key_sums": key_sums[:, last:].clone(),
            "key": key[:, last * places :].clone(),
            "value": value[:, last * places :].clone(),
        }

    def _far(self, sums: Tensor, low: int, high: int) -> Tensor:
        """Add up what is before frame `low` and, unless causal, from frame `high` on."""
        before = sums[:, :low].sum(dim=1)
        return before if self.options.causal else before + sums[:, high:].sum(dim=1)
