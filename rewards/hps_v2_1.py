"""HPS v2.1: CLIP H/14 trained on human preferences (arXiv 2306.09341)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from postgen.rewards.clip import H_14_TOKENIZER, VIT_H_14, ClipReward, open_clip_net
from postgen.rewards.pictures import padded_pixels
from postgen.rewards.weights import find_file


class HPSv21(ClipReward):
    """Cosine similarity of frame and prompt, about .2 to .37 (the published benchmark prints it times 100).

    As in the published code, frames are padded with black instead of cropped, and resized without clamping. Alone,
    this reward drives a policy towards glossy frames and grid patterns; combined with `clip_score`, much less so.

    Args:
        model: Hub id, local folder or file.
        file: the checkpoint in `model`, in open_clip's layout.
        shape: configuration of the network, in open_clip's form.
        tokenizer, frames, reduce, device, dtype: see `ClipReward`.
    """

    name = "hps_v2_1"
    model = "xswu/HPSv2"

    def __init__(
        self,
        model: str | None = None,
        file: str = "HPS_v2.1_compressed.pt",
        shape: Mapping[str, Any] = VIT_H_14,
        tokenizer: str | None = H_14_TOKENIZER,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        self.file, self.shape = file, shape

    def needed(self) -> Sequence[tuple[str, str]]:
        """Return the place of the checkpoint."""
        return ((self.model, self.file),)

    def build(self) -> nn.Module:
        """Load the checkpoint.

        Raises:
            UserError: the checkpoint cannot be found, or its weights do not fit.
        """
        return open_clip_net(find_file(self.model, self.file), self.shape)

    def pixels(self, frames_N3HW: Tensor) -> Tensor:
        """Preprocess the frames, with padding instead of a crop."""
        return padded_pixels(frames_N3HW, self.net.config.vision_config.image_size)

    def frame_scores(self, frames_BK3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine similarities (B,K)."""
        return self.cosines(frames_BK3HW, prompts)
