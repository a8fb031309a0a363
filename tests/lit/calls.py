"""Random inputs of self-attention layers in float64, and explicit N x N attention to compare the layers with."""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.families import Grid
from postgen.families.attention.reading import Norms, Reading, Rope, Stream
from postgen.lit.features import rotate
from postgen.lit.layers.base import Shape
from postgen.lit.tokens import Tokens

HEADS, CHANNELS, HIDDEN = 2, 4, 6
SHAPE = Shape(heads=HEADS, channels=CHANNELS, hidden=HIDDEN)


class Call:
    """Tensors of one call. Tests may change any of them before `tokens` builds the input of a layer."""

    def __init__(
        self, frames: int = 3, rows: int = 2, columns: int = 3, *, batch: int = 1, text: int = 0, rope: bool = True,
        text_first: bool = False, lengths: list[int] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.grid = Grid(frames=frames, height=rows, width=columns)
        self.text, self.text_first = text, text_first
        self.lengths = None if lengths is None else torch.tensor(lengths) + self.grid.tokens
        shape = (batch, self.grid.tokens + text, HEADS, CHANNELS)
        self.query, self.key, self.value = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
        self.hidden = torch.randn(batch, self.grid.tokens, HIDDEN, dtype=torch.float64)
        self.rope = self._rope() if rope else None

    def _rope(self) -> Rope:
        """Return a rotary embedding that no kernel supports: one pair depends on the frame, one on row and column."""
        grid = self.grid
        places = torch.cartesian_prod(*(torch.arange(n).double() for n in (grid.frames, grid.height, grid.width)))
        angles = torch.stack([places[:, 0] * 0.7, places[:, 1] * 0.4 + places[:, 2] * 0.3], dim=1)[None, :, None]
        first = self.text if self.text_first else 0
        return Rope(angles.cos(), angles.sin(), first, in_float32=False)

    @property
    def video(self) -> slice:
        return slice(self.text, None) if self.text_first else slice(0, self.grid.tokens)

    def tokens(self) -> Tokens:
        stream = Stream(self.query, self.key, self.value, Norms(None, None), self.rope)
        mask = None if self.lengths is None else torch.ones(1)
        reading = Reading(
            streams=(stream,), text=self.text, text_first=self.text_first, mask=mask, key_lengths=self.lengths
        )
        return Tokens(reading, self.grid, self.hidden)

    def part(self, first: int, stop: int) -> Tokens:
        """Return the input for some frames without text; tokens keep their positions in the whole clip."""
        places = self.grid.height * self.grid.width
        rows = slice(first * places, stop * places)
        rope = None if self.rope is None else Rope(self.rope.cos[:, rows], self.rope.sin[:, rows], in_float32=False)
        stream = Stream(self.query[:, rows], self.key[:, rows], self.value[:, rows], Norms(None, None), rope)
        grid = Grid(frames=stop - first, height=self.grid.height, width=self.grid.width)
        return Tokens(Reading(streams=(stream,)), grid, self.hidden[:, rows])

    def rotated(self, x: Tensor) -> Tensor:
        """Apply the rotary embedding to video tokens."""
        return rotate(x, self.rope)

    def scores(self) -> Tensor:
        """Return exp of the logits for the queries of the video and all keys, (B, H, N, M)."""
        query, key, _ = self.tokens().rotated()
        scores = torch.einsum("bnhd,bmhd->bhnm", query[:, self.video], key) * CHANNELS**-0.5
        if self.lengths is not None:
            scores = scores.masked_fill(torch.arange(scores.shape[-1]) >= self.lengths.view(-1, 1, 1, 1), -torch.inf)
        return scores.exp()

    def frames_of_tokens(self) -> Tensor:
        """Return the frame index of each video token, (N,)."""
        return torch.arange(self.grid.frames).repeat_interleave(self.grid.height * self.grid.width)


def applied(weights: Tensor, value: Tensor) -> Tensor:
    """Return the weighted sums of values: (B, H, N, M) and (B, M, H, D) -> (B, N, H, D)."""
    return torch.einsum("bhnm,bmhd->bnhd", weights, value)


def drawn(layer: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Convert a layer to float64 and add random numbers to all of its weights."""
    torch.manual_seed(seed)
    layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer
