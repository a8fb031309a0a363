"""What the layers of one transformer share of the call under way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from postgen.enhance.config import EnhanceAVideoConfig
    from postgen.families import Grid, VideoTokens

T = TypeVar("T")


class PerThread(threading.local, Generic[T]):
    """An object for each thread. Compiled code may read `own` and write into it (what it writes here is lost)."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self.own = make()

    def __reduce__(self) -> tuple[Any, ...]:
        return PerThread, (self._make,)


class Kept:
    """What was kept of the last call under gradients, for whatever thread autograd runs layers again in."""

    def __init__(self) -> None:
        self.values: tuple[Any, ...] | None = None


class VideoCall:
    """The settings, where the video's tokens are, and the geometry of the call under way in a thread.

    The transformer's hooks write it before its layers run, the layers read it.
    """

    def __init__(
        self, transformer: str, model_config: Any, video: VideoTokens, config: EnhanceAVideoConfig, kept: Kept
    ) -> None:
        self.transformer = transformer
        """Name of the class, for messages."""
        self.model_config = model_config
        self.video = video
        self.config = config
        self.kept = kept
        self.begun = False
        """Whether this thread has called the transformer."""
        self.active = False
        """Whether the call under way is enhanced."""
        self.frames, self.places = 0, 0
        """T and S of the call under way."""

    @property
    def tokens(self) -> int:
        """Video tokens of the call under way."""
        return self.frames * self.places

    @property
    def causal_frames(self) -> int:
        """Frames in a block of block-causal attention; 0: every frame sees every frame."""
        rule = self.video.causal_rule
        return 0 if rule is None else rule(self.model_config)

    def keep(self) -> None:
        """Keep the call for layers that are run again."""
        self.kept.values = self.active, self.config, self.frames, self.places

    def resume(self) -> None:
        """Take what was kept."""
        if self.kept.values is not None:
            self.active, self.config, self.frames, self.places = self.kept.values

    def measure(self, grid: Grid) -> None:
        """Take the geometry of a call."""
        self.frames, self.places = grid.frames, grid.height * grid.width

    def locate(self, query: Tensor, key: Tensor, text: int) -> tuple[Tensor, Tensor] | None:
        """Cut the video tokens out of (B, L, heads, D) queries and keys, as (B, T, S, heads, D) views.

        Args:
            query: as attention sees it.
            key: as attention sees it; it may be longer than the queries where the video's tokens come first.
            text: tokens of the text stream, as the module was called.

        Returns:
            None where the tokens do not match the geometry of the call.
        """
        frames, places, order = self.frames, self.places, self.video.token_order
        if self.video.factorised:
            if query.shape[1] != frames or query.shape[0] % places:
                return None
            return query.unflatten(0, (-1, places)).transpose(1, 2), key.unflatten(0, (-1, places)).transpose(1, 2)
        length = query.shape[1]
        others = {"video": 0, "video-text": text, "text-video": text}.get(order)
        if length < self.tokens or (others is not None and length > self.tokens + others):
            return None
        step = 1 if self.config.max_locations is None else -(-places // self.config.max_locations)
        first = order in ("video", "video-text", "video-reference")
        found = []
        for x in (query, key):
            start = 0 if first else x.shape[1] - self.tokens - (text if order == "history-video-text" else 0)
            if start < 0 or x.shape[1] < start + self.tokens:
                return None
            found.append(x[:, start : start + self.tokens].unflatten(1, (frames, places))[:, :, ::step])
        return found[0], found[1]
