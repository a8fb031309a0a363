"""ConSE: an offline proxy for text-video alignment (arXiv 1312.5650), from an image classifier and a text encoder.

EfficientNet-Lite0 predicts classes for a frame. The MiniLM embeddings of sentences about these classes are averaged
and compared with the embedding of the prompt. Both networks come from packages; nothing is downloaded. The reward
hardly measures direction, number, or who does what, and knows only ImageNet's classes: never use it as the only
reward, and never report it as CLIP.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from postgen.assets import locate, verify
from postgen.errors import UserError, check_number
from postgen.rewards.efficientnet import SIDE, EfficientNetLite0
from postgen.rewards.frames import FrameReward
from postgen.rewards.pictures import centre_crop, resize, shorter_side
from postgen.rewards.weights import fill, pretrained, read_state, tokenizer_of

TOP = 10
"""Number of classes that are averaged."""


def class_sentences() -> list[str]:
    """Return a sentence for each of the 1000 classes of ImageNet, in the classifier's order."""
    path = Path(__file__).parent / "data" / "imagenet_names.json"
    return [f"a photo of a {name}" for name in json.loads(path.read_text(encoding="utf-8"))]


class Conse(FrameReward):
    """Cosine similarity of the predicted classes of a frame and the prompt, about 0.05 to 0.6.

    Args:
        top: number of classes that are averaged, weighted by their probabilities.
        frames, reduce, device, dtype: see `FrameReward`.
    """

    name = "conse"

    def __init__(self, top: int = TOP, **options: Any) -> None:
        super().__init__(**options)
        check_number("top", top, 1, 1000, whole=True)
        self.top = top
        self._tokenizer: Any = None
        self._classes: Tensor | None = None

    def lacking(self) -> str | None:
        """Return a message that names a missing package; None if both packages are installed."""
        try:
            for name in ("efficientnet-lite0", "minilm"):
                locate(name)
        except UserError as error:
            return str(error)
        return None

    def build(self) -> nn.Module:
        """Load both networks from their packages.

        Raises:
            UserError: a package is not installed, or its file has other contents than expected.
        """
        from transformers import AutoModel

        path = verify("efficientnet-lite0")
        words = verify("minilm").parent
        self._tokenizer = tokenizer_of(str(words))
        seen, text = fill(EfficientNetLite0(), read_state(path), path), pretrained(AutoModel, str(words))
        return nn.ModuleDict({"seen": seen, "text": text})

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """Return MiniLM's normalised embeddings (N,384), the mean over the tokens."""
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
        tokens = {name: value.to(self.device) for name, value in tokens.items()}
        mask = tokens["attention_mask"][..., None]
        states = self.net["text"](**tokens).last_hidden_state.float()
        return normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def frame_scores(self, frames_BK3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine similarities (B,K)."""
        net = self.net
        if self._classes is None or self._classes.device != frames_BK3HW.device:
            self._classes = self.sentences(class_sentences())
        x = frames_BK3HW.flatten(0, 1)
        x = centre_crop(resize(x, *shorter_side(x, SIDE)), SIDE).to(self.dtype)
        likely, classes = net["seen"](x).float().softmax(-1).topk(self.top, -1)
        mixed = torch.einsum("nk,nkd->nd", likely / likely.sum(-1, keepdim=True), self._classes[classes])
        seen = normalize(mixed, dim=-1).unflatten(0, frames_BK3HW.shape[:2])
        return torch.einsum("bkd,bd->bk", seen, self.sentences(prompts))
