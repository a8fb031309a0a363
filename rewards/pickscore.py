"""PickScore: CLIP H/14 trained on half a million choices of users (arXiv 2305.01569, eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from postgen.rewards.clip import H_14_TOKENIZER, ClipReward


class PickScore(ClipReward):
    """exp(logit scale) times the cosine similarity of frame and prompt, about 18 to 24.

    Args:
        model: Hub id or local folder.
        tokenizer: Hub id or local folder; the published weights have no tokenizer, so LAION's is the default.
        frames, reduce, device, dtype: see `ClipReward`.
    """

    name = "pickscore"
    model = "yuvalkirstain/PickScore_v1"

    def __init__(self, model: str | None = None, tokenizer: str | None = H_14_TOKENIZER, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)

    def frame_scores(self, frames_BK3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scaled cosine similarities (B,K)."""
        scale: Tensor = self.net.logit_scale.float().exp()
        return scale * self.cosines(frames_BK3HW, prompts)
