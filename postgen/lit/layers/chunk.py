"""`chunk`: softmax attention within a chunk of frames and a few frames before it, linear attention over the other
frames (ReHyAt, arXiv:2601.04342).

The formula is that of `anchor` (see `layers/anchor.py`) with other sets of keys. T_S holds the frames of the query's
chunk, the `overlap` frames before the chunk, and all text tokens. T_L holds all earlier frames and, unless the layer
is causal, all later frames. With one chunk for the whole clip the layer computes softmax attention.
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
    """The layer type `chunk`: softmax over near frames, linear attention over the other frames."""

    kind = "chunk"
    options: ChunkOptions

    def covers(self, grid: Grid) -> bool:
        """Whether one chunk holds the whole clip, so that the layer equals the stock attention."""
        return self.options.frames >= grid.frames

    def forward(self, tokens: Tokens) -> Tensor:
        """Return the outputs of the video tokens, (B, N, H, D)."""
        return self._rows(tokens, None)[0]

    def stream(self, tokens: Tokens, state: State | None) -> tuple[Tensor, State]:
        """Compute the next frames of a stream; see `LitLayer.stream`.

        Every piece but the last must be a whole number of chunks. The state holds the last `overlap` frames and the
        sums over all frames before them.
        """
        if not self.options.causal:
            return super().stream(tokens, state)
        pushed = check_pushed(state, self.options.frames) + tokens.grid.frames
        out, found = self._rows(tokens, state)
        return out, {**found, "pushed": torch.tensor(pushed)}

    def flops(self, grid: Grid, text: int) -> int:
        """Return the FLOPs of one call with one sample."""
        places = grid.height * grid.width
        pairs = sum((stop - first) * (stop - low) for first, stop, low in self._chunks(grid.frames))
        return (
            4 * pairs * places**2 * self.shape.heads * self.shape.channels
            + softmax_flops(grid.tokens, text, self.shape)
            + softmax_flops(text, grid.tokens + text, self.shape)
            + self.linear_flops(grid)
        )

    def _chunks(self, frames: int, kept: int = 0) -> Iterator[tuple[int, int, int]]:
        """Yield (first, stop, low) of each chunk of a piece.

        The chunk holds the frames from `first` to `stop` - 1, counted from the start of the piece. Its softmax begins
        at frame `low`, counted from the first of the `kept` frames of earlier pieces.
        """
        for first in range(0, frames, self.options.frames):
            yield first, min(first + self.options.frames, frames), max(0, first + kept - self.options.overlap)

    def _rows(self, tokens: Tokens, state: State | None) -> tuple[Tensor, State]:
        """Compute all chunks of a piece and return their outputs and the state for the next piece."""
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
        # The state's frames, which softmax still reads, come first. `past` sums up all frames before them.
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
            # Clones, because a view would keep the whole earlier tensor in memory.
            "sums": sums[:, last:].clone(),
            "key_sums": key_sums[:, last:].clone(),
            "key": key[:, last * places :].clone(),
            "value": value[:, last * places :].clone(),
        }

    def _far(self, sums: Tensor, low: int, high: int) -> Tensor:
        """Sum over the frames before `low` and, unless the layer is causal, over the frames from `high` on."""
        before = sums[:, :low].sum(dim=1)
        return before if self.options.causal else before + sums[:, high:].sum(dim=1)
