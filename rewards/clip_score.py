"""CLIP score: how well frames match the prompt (arXiv 2104.08718, without its weight 2.5 and its lower bound 0)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from postgen.rewards.clip import ClipReward, open_clip_net, open_clip_pixels, open_clip_settings
from postgen.rewards.weights import find_file


class ClipScore(ClipReward):
    """Cosine similarity of frame and prompt, about .15 to .35 with OpenAI's L/14.

    Args:
        model: Hub id or local folder of a `CLIPModel`; OpenAI's L/14 (MIT) by default.
        open_clip: file of open_clip weights in `model`, for instance `open_clip_model.safetensors`; shape and
            preprocessing are read from the `open_clip_config.json` next to it. None loads transformers' layout.
        tokenizer, frames, reduce, device, dtype: see `ClipReward`.
    """

    name = "clip_score"
    model = "openai/clip-vit-large-patch14"

    def __init__(self, model: str | None = None, open_clip: str | None = None, **options: Any) -> None:
        super().__init__(model, **options)
        self.open_clip = open_clip
        self._settings: dict[str, Any] = {}

    def needed(self) -> Sequence[tuple[str, str]]:
        """Return the place of the network, in transformers' or open_clip's layout."""
        return ((self.model, self.open_clip or ""),)

    def build(self) -> nn.Module:
        """Load the network from transformers' or open_clip's layout.

        Raises:
            UserError: the network cannot be found, or its weights do not fit.
        """
        if self.open_clip is None:
            return super().build()
        self._settings = open_clip_settings(self.model)
        return open_clip_net(find_file(self.model, self.open_clip), self._settings["model_cfg"])

    def pixels(self, frames_N3HW: Tensor) -> Tensor:
        """Preprocess the frames for this network."""
        if self.open_clip is None:
            return super().pixels(frames_N3HW)
        return open_clip_pixels(
            frames_N3HW, self.net.config.vision_config.image_size, self._settings["preprocess_cfg"]
        )

    def frame_scores(self, frames_BK3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine similarities (B,K)."""
        return self.cosines(frames_BK3HW, prompts)
