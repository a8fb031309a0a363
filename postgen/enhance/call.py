"""What the layers of one transformer share of the call under way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from postgen.enhance.config import EnhanceAVideoConfig
    from postgen.families import Grid, VideoTokens


class VideoCall:
    """The settings, where the video's tokens are, and the geometry of the call under way.

    The transformer's hooks write it before its layers run, the layers read it.
    """

    def __init__(self, transformer: str, model_config: Any, video: VideoTokens, config: EnhanceAVideoConfig) -> None:
        self.transformer = transformer
        """Name of the class, for messages."""
        self.model_config = model_config
        self.video = video
        self.config = config
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
