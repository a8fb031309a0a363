"""The input of a layer in one call of self-attention: the video tokens in their grid, and the text tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families.attention.reading import Rope
from postgen.kernels.dispatch import for_triton
from postgen.kernels.qk_norm_rope.ops import qk_norm_rope
from postgen.lit.features import centered

if TYPE_CHECKING:
    from postgen.families import Grid
    from postgen.families.attention.reading import Reading, Stream


class Tokens:
    """Queries, keys and values of one call of self-attention.

    Tensors are (B, N, H, D) for the N video tokens. Only methods that mention "all tokens" include the text tokens.

    Args:
        reading: the result of the architecture's reader in `families.attention`.
        grid: the grid of the video tokens.
        hidden: the hidden states from which the video's queries, keys and values are projected, (B, N, C).

    Raises:
        UserError: the number of video tokens differs from the grid, or the mask does more than hide padding of texts.
    """

    def __init__(self, reading: Reading, grid: Grid, hidden: Tensor) -> None:
        self.grid, self.hidden, self.text = grid, hidden, reading.text
        self._streams, self._video = reading.streams, reading.video
        self._text_first = reading.text_first
        self._normed: list[tuple[Tensor, Tensor]] | None = None
        self._rotated: tuple[Tensor, Tensor, Tensor] | None = None
        self._lengths = [stream.query.shape[1] for stream in reading.streams]
        if sum(self._lengths) - self.text != grid.tokens:
            raise UserError(
                f"this call has {sum(self._lengths) - self.text} video tokens, but the grid {grid.frames} x"
                f" {grid.height} x {grid.width} has {grid.tokens}: converted models support no references, history or"
                " context parallelism"
            )
        if reading.mask is not None and (reading.key_lengths is None or (self.text and reading.text_first)):
            raise UserError(
                "this call has an attention mask between video tokens: converted models support only masks of padded"
                " texts"
            )
        self.key_lengths = reading.key_lengths
        """Number of valid keys per sample, text included, (B,), where padded text keys come last; None for all."""

    @property
    def text_lengths(self) -> Tensor | None:
        """Number of valid text keys per sample, (B,); None for all."""
        return None if self.key_lengths is None else self.key_lengths - self.grid.tokens

    @property
    def text_rows(self) -> slice:
        """Positions of the text tokens among all tokens."""
        return slice(self.text) if self._text_first else slice(self.grid.tokens, None)

    @property
    def video_rows(self) -> slice:
        """Positions of the video tokens among all tokens."""
        return self._video

    @property
    def value(self) -> Tensor:
        """Values of the video tokens."""
        return self._of_video(lambda stream: stream.value)

    @property
    def rope(self) -> Rope | None:
        """Rotary embedding of the video tokens, with tables (1 or B, N, 1 or H, D / 2); None if there is none."""
        first = self._video.start or 0
        for stream, length in zip(self._streams, self._lengths, strict=True):
            if first < length:
                return _rows(stream.rope, first, self.grid.tokens)
            first -= length
        raise AssertionError("the video is in one of the streams")

    def raw(self) -> tuple[Tensor, Tensor]:
        """Return projected queries and keys, before norm and rotary embedding."""
        return self._of_video(lambda stream: stream.query), self._of_video(lambda stream: stream.key)

    def normed(self) -> tuple[Tensor, Tensor]:
        """Return queries and keys after their norms, before rotary embedding."""
        query, key = (list(part) for part in zip(*self._all_normed(), strict=True))
        return self._cut(query), self._cut(key)

    def centered(self) -> tuple[Tensor, Tensor]:
        """Return `normed`, with the mean over the tokens subtracted from the keys."""
        stream = self._streams[0]
        alone = len(self._streams) == 1 and not self.text
        if alone and for_triton(stream.query, stream.key) and not torch.is_grad_enabled():
            query, key, left = stream.for_one_kernel()
            if left and left["norm"] != "none":
                # The fused norm kernel subtracts the mean. One more call of the norm, to compute the mean, is cheaper
                # than a separate pass over the keys for the subtraction.
                dtype = torch.promote_types(stream.key.dtype, torch.float32)
                shift = stream.norms.called_on_keys(stream.key).mean(dim=1, dtype=dtype)
                rope = {"cos": None, "sin": None, "first_token": 0}
                query, key = qk_norm_rope(query, key, k_shift=shift, **{**left, **rope})
                return query, key
        query, key = self.normed()
        return query, centered(key)

    def rotated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of all tokens for softmax attention: normalised and rotated."""
        if self._rotated is None:
            # On a GPU one fused kernel normalises and rotates. Elsewhere the operations of diffusers run.
            if all(for_triton(stream.query, stream.key) for stream in self._streams):
                turned = [_normed_and_rotated(stream) for stream in self._streams]
            else:
                pairs = zip(self._streams, self._all_normed(), strict=True)
                turned = [(_turned(stream.rope, query), _turned(stream.rope, key)) for stream, (query, key) in pairs]
            parts = [(*pair, stream.value) for pair, stream in zip(turned, self._streams, strict=True)]
            whole = tuple(torch.cat(part, dim=1) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
            self._rotated = (whole[0], whole[1], whole[2])
        return self._rotated

    def softmax_parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `rotated` for the video tokens only."""
        query, key, value = (each[:, self._video] for each in self.rotated())
        return query, key, value

    def text_keys(self) -> tuple[Tensor, Tensor] | None:
        """Return keys and values of the L text tokens, (B, L, H, D); None without text tokens."""
        if not self.text:
            return None
        _, key, value = self.rotated()
        return key[:, self.text_rows], value[:, self.text_rows]

    def with_text(self, video: Tensor, text: Tensor) -> Tensor:
        """Concatenate attention outputs of the video and of the text, in the order of all tokens."""
        return torch.cat([text, video] if self._text_first else [video, text], dim=1)

    def _all_normed(self) -> list[tuple[Tensor, Tensor]]:
        """Return queries and keys of every stream after their norms."""
        if self._normed is None:
            self._normed = [stream.norms.called(stream.query, stream.key) for stream in self._streams]
        return self._normed

    def _of_video(self, part: Callable[[Stream], Tensor]) -> Tensor:
        return self._cut([part(stream) for stream in self._streams])

    def _cut(self, parts: list[Tensor]) -> Tensor:
        first = self._video.start or 0
        for part in parts:  # one stream contains the whole video
            if first < part.shape[1]:
                whole = part.shape[1] == self.grid.tokens
                return part if whole else part[:, first : first + self.grid.tokens]
            first -= part.shape[1]
        raise AssertionError("the video is in one of the streams")


def _normed_and_rotated(stream: Stream) -> tuple[Tensor, Tensor]:
    query, key, left = stream.for_one_kernel()
    if left:
        query, key = qk_norm_rope(query, key, **left)
    return query, key


def _turned(rope: Rope | None, x: Tensor) -> Tensor:
    return x if rope is None else rope.rotated(x)


def _rows(rope: Rope | None, first: int, tokens: int) -> Rope | None:
    """Return the rotary embedding of the tokens from `first` on. Known architectures rotate all video tokens."""
    if rope is None:
        return None
    start = first - rope.first_token
    assert 0 <= start <= rope.cos.shape[1] - tokens, "the video is rotated as a whole"
    rows = slice(start, start + tokens)
    return Rope(rope.cos[:, rows], rope.sin[:, rows], in_float32=rope.in_float32)
