"""The improved aesthetic predictor "sac+logos+ava1": a chain of linear layers on the image embedding of CLIP L/14."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from postgen.rewards.base import promptless
from postgen.rewards.clip import ClipReward
from postgen.rewards.pictures import clip_pixels
from postgen.rewards.weights import State, fill, find_file, pretrained, read_state

HEAD = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)


def linear_chain(width: int) -> nn.Sequential:
    """Return linear layers of sizes width-1024-128-64-16-1 without activations; dropouts are left out.

    The published head and the head of ImageReward have this form. Without activations the chain is one affine map. It
    is kept as separate layers so that the published weights load.
    """
    sizes = (width, 1024, 128, 64, 16, 1)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def chain_state(state: State, prefix: str = "layers.") -> State:
    """Rename the published layers 0, 2, 4, 6, 7 (the indices between are dropouts) to 0 ... 4."""
    places = {"0": "0", "2": "1", "4": "2", "6": "3", "7": "4"}
    parts = {name: name.removeprefix(prefix).split(".") for name in state}
    return {".".join((places.get(p[0], p[0]), *p[1:])): state[name] for name, p in parts.items()}


@promptless
class Aesthetic(ClipReward):
    """Predict how beautiful people find the frames, about 1 to 10; the prompt is not used.

    Args:
        model: Hub id or local folder of CLIP L/14.
        head: https address or local path of the published head (Apache-2.0).
        tokenizer, frames, reduce, device, dtype: see `ClipReward`.
    """

    name = "aesthetic"
    model = "openai/clip-vit-large-patch14"

    def __init__(self, model: str | None = None, head: str = HEAD, **options: Any) -> None:
        super().__init__(model, **options)
        self.head = head

    def needed(self) -> Sequence[tuple[str, str]]:
        """Return the places of the image encoder and the head."""
        return ((self.model, ""), (self.head, ""))

    def build(self) -> nn.Module:
        """Load CLIP's image encoder and the head.

        Raises:
            UserError: a file cannot be found, or its weights do not fit.
        """
        from transformers import CLIPVisionModelWithProjection

        net = pretrained(CLIPVisionModelWithProjection, self.model)
        width, path = net.visual_projection.out_features, find_file(self.head)
        net.add_module("head", fill(linear_chain(width), chain_state(read_state(path)), path))
        whole: nn.Module = net
        return whole

    def pixels(self, frames_N3HW: Tensor) -> Tensor:
        """Prepare the frames for CLIP; the crop rounds as torchvision does, because the head was trained with it."""
        return clip_pixels(frames_N3HW, self.net.config.image_size, half_even=True)

    def frame_scores(self, frames_BK3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the head's score of each frame's normalised image embedding, (B,K)."""
        features = self.image_features(frames_BK3HW.flatten(0, 1)).to(self.dtype)
        scores: Tensor = self.net.head(features)
        return scores.float().view(frames_BK3HW.shape[:2])
