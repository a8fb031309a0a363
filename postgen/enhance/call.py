"""State of the current forward pass of one transformer, which its layers share."""

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
    """One object per thread, in `own`.

    Compiled code may read `own` and set attributes of that object; attributes that it sets on this class are lost.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self.own = make()

    def __reduce__(self) -> tuple[Any, ...]:
        return PerThread, (self._make,)


class Kept:
    """Values of the last forward pass with gradients.

    With gradient checkpointing, autograd may run the layers again in another thread, which reads these values.
    """

    def __init__(self) -> None:
        self.values: tuple[Any, ...] | None = None


class VideoCall:
    """Settings, token order and geometry of the current forward pass in one thread.

    The hooks of the transformer write this object before the layers run; the layers read it.
    """

    def __init__(
        self, transformer: str, model_config: Any, video: VideoTokens, config: EnhanceAVideoConfig, kept: Kept
    ) -> None:
        self.transformer = transformer
        """Name of the transformer class, for messages."""
        self.model_config = model_config
        self.video = video
        self.config = config
        self.kept = kept
        self.begun = False
        """Whether this thread has called the transformer."""
        self.active = False
        """Whether Enhance-A-Video acts in the current forward pass."""
        self.frames, self.places = 0, 0
        """T latent frames and S tokens per frame in the current forward pass."""

    @property
    def tokens(self) -> int:
        """Number of video tokens in the current forward pass."""
        return self.frames * self.places

    @property
    def causal_frames(self) -> int:
        """Frames per block of block-causal attention; 0 if every frame attends to every frame."""
        rule = self.video.causal_rule
        return 0 if rule is None else rule(self.model_config)

    def keep(self) -> None:
        """Save the state of the forward pass for layers that autograd runs again."""
        self.kept.values = self.active, self.config, self.frames, self.places

    def resume(self) -> None:
        """Restore the saved state, if there is one."""
        if self.kept.values is not None:
            self.active, self.config, self.frames, self.places = self.kept.values

    def measure(self, grid: Grid) -> None:
        """Set the geometry of the current forward pass from its token grid."""
        self.frames, self.places = grid.frames, grid.height * grid.width

    def locate(self, query: Tensor, key: Tensor, text: int) -> tuple[Tensor, Tensor] | None:
        """Select the video tokens of queries and keys (B, L, heads, D), as views (B, T, S, heads, D).

        With `max_locations`, S counts only the evenly spaced tokens per frame that are measured.

        Args:
            query: queries as the attention function receives them.
            key: keys as the attention function receives them. There may be more keys than queries if the video tokens
                come first.
            text: number of text tokens in the call of the module.

        Returns:
            Queries and keys; None if the tokens do not match the geometry of the forward pass.
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
