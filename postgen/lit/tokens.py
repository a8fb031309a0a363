"""What a layer sees of one call of self-attention: the video's tokens in their grid, and the text beside them."""

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
    """Queries, keys and values of one call, (B, N, H, D) for the N tokens of the video but where "all" is said.

    Args:
        reading: as the architecture's file in `families.attention` gives it.
        grid: of the video's tokens.
        hidden: (B, N, C), what the video's queries, keys and values were projected from.

    Raises:
        UserError: another number of tokens than the grid has, or a mask that says more than how long the texts are.
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
                f"{sum(self._lengths) - self.text} tokens of the video are no grid of {grid.frames} x {grid.height} x"
                f" {grid.width}: a converted model takes no references, history or split among ranks"
            )
        if reading.mask is not None and (reading.key_lengths is None or (self.text and reading.text_first)):
            raise UserError(
                "a mask between tokens of the video: a converted model takes none but that of padded texts"
            )
        self.key_lengths = reading.key_lengths
        """(B,): how many of all keys count, text included, which is last then; None: all."""

    @property
    def text_lengths(self) -> Tensor | None:
        """(B,): how many of the text's keys count; None: all."""
        return None if self.key_lengths is None else self.key_lengths - self.grid.tokens

    @property
    def text_rows(self) -> slice:
        """The text's tokens among all."""
        return slice(self.text) if self._text_first else slice(self.grid.tokens, None)

    @property
    def video_rows(self) -> slice:
        """The video's tokens among all."""
        return self._video

    @property
    def value(self) -> Tensor:
        """Values."""
        return self._of_video(lambda stream: stream.value)

    @property
    def rope(self) -> Rope | None:
        """The rotation of the video's tokens, with tables (1 or B, N, 1 or H, D / 2); None: they are not rotated."""
        first = self._video.start or 0
        for stream, length in zip(self._streams, self._lengths, strict=True):
            if first < length:
                return _rows(stream.rope, first, self.grid.tokens)
            first -= length
        raise AssertionError("the video is in one of the streams")

    def raw(self) -> tuple[Tensor, Tensor]:
        """Return queries and keys as they were projected, without norm and rotation."""
        return self._of_video(lambda stream: stream.query), self._of_video(lambda stream: stream.key)

    def normed(self) -> tuple[Tensor, Tensor]:
        """Return queries and keys after their norms, without rotation."""
        query, key = (list(part) for part in zip(*self._all_normed(), strict=True))
        return self._cut(query), self._cut(key)

    def centered(self) -> tuple[Tensor, Tensor]:
        """Return `normed`, the keys less their mean over the tokens."""
        stream = self._streams[0]
        alone = len(self._streams) == 1 and not self.text
        if alone and for_triton(stream.query, stream.key) and not torch.is_grad_enabled():
            query, key, left = stream.for_one_kernel()
            if left and left["norm"] != "none":
                # The difference in the kernel of the norms: another call of a norm is cheaper than a pass of its own.
                dtype = torch.promote_types(stream.key.dtype, torch.float32)
                shift = stream.norms.called_on_keys(stream.key).mean(dim=1, dtype=dtype)
                rope = {"cos": None, "sin": None, "first_token": 0}
                query, key = qk_norm_rope(query, key, k_shift=shift, **{**left, **rope})
                return query, key
        query, key = self.normed()
        return query, centered(key)

    def rotated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys of all tokens as softmax attention reads them, and the values."""
        if self._rotated is None:
            # On a GPU one kernel norms and rotates; elsewhere both are as in diffusers.
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
        """Return `rotated` of the video alone."""
        query, key, value = (each[:, self._video] for each in self.rotated())
        return query, key, value

    def text_keys(self) -> tuple[Tensor, Tensor] | None:
        """Return keys and values (B, L, H, D) of the text; None: there is none among the tokens."""
        if not self.text:
            return None
        _, key, value = self.rotated()
        return key[:, self.text_rows], value[:, self.text_rows]

    def with_text(self, video: Tensor, text: Tensor) -> Tensor:
        """Return what attention gave for the video and for the text in the order of all tokens."""
        return torch.cat([text, video] if self._text_first else [video, text], dim=1)

    def _all_normed(self) -> list[tuple[Tensor, Tensor]]:
        """Queries and keys of every stream after their norms."""
        if self._normed is None:
            self._normed = [stream.norms.called(stream.query, stream.key) for stream in self._streams]
        return self._normed

    def _of_video(self, part: Callable[[Stream], Tensor]) -> Tensor:
        return self._cut([part(stream) for stream in self._streams])

    def _cut(self, parts: list[Tensor]) -> Tensor:
        first = self._video.start or 0
        for part in parts:  # the video is within one of the streams
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
    """Return the rotation of some rows; all of them are rotated in the architectures that there are."""
    if rope is None:
        return None
    start = first - rope.first_token
    assert 0 <= start <= rope.cos.shape[1] - tokens, "the video is rotated as a whole"
    rows = slice(start, start + tokens)
    return Rope(rope.cos[:, rows], rope.sin[:, rows], in_float32=rope.in_float32)
