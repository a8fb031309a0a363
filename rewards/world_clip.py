"""A CLIP of the synthetic world: how well clip and sentence match, by two small encoders trained on rendered scenes.

The reward is learned, and therefore exploitable, like the large rewards that it replaces; `world` measures the same
exactly. Method: arXiv:2103.00020, where sentences of the same meaning count as equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from postgen.rewards.base import Clip, RewardModel, streaming
from postgen.rewards.world_net import (
    TextTower,
    VideoTower,
    load_weights,
    prepare,
    read_config,
    reward_folder,
    save_net,
)

FOLDER = "world-clip"
_KEYS = {"video", "text", "size", "embedding"}


class WorldClipNet(nn.Module):
    """The video encoder and the text encoder, with normalised embeddings in a shared space.

    Args:
        video: arguments of `VideoTower`.
        text: arguments of `TextTower`.
        embedding: width of the shared space.
    """

    def __init__(self, *, video: dict[str, Any], text: dict[str, Any], embedding: int) -> None:
        super().__init__()
        self.video, self.text = VideoTower(**video), TextTower(**text)
        self.from_video = nn.Linear(video["width"], embedding, bias=False)
        self.from_text = nn.Linear(text["width"], embedding, bias=False)
        # exp(2.66) corresponds to a temperature of 0.07.
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def embed_video(self, clips_BT3HW: Tensor) -> Tensor:
        """Embed clips of the network's size and length, (B,E)."""
        return functional.normalize(self.from_video(self.video(clips_BT3HW)).float(), dim=-1)

    def embed_text(self, ids_BL: Tensor) -> Tensor:
        """Embed token ids, where 0 is padding, (B,E)."""
        return functional.normalize(self.from_text(self.text(ids_BL)).float(), dim=-1)

    def forward(self, clips_BT3HW: Tensor, ids_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return both embeddings and the scale of their cosine similarities (for training)."""
        return self.embed_video(clips_BT3HW), self.embed_text(ids_BL), self.log_scale.clamp(max=4.6).exp()


@streaming
class WorldClip(RewardModel):
    """Cosine similarity of a clip and its prompt, in [-1,1].

    Args:
        model: folder exported by the method `world_clip`; None uses the weights of the package.
        device, dtype: see `RewardModel`.
    """

    name = "world_clip"

    def __init__(self, *, model: str | Path | None = None, **place: Any) -> None:
        super().__init__(**place)
        self.model = model
        self.tokenizer: Any = None
        self.size = self.frames = self.length = 0

    def build(self) -> nn.Module:
        """Load the network and the tokenizer from the folder.

        Raises:
            UserError: the weights are missing or those of another model.
        """
        from transformers import PreTrainedTokenizerFast

        folder = reward_folder(self.model, FOLDER)
        config = read_config(folder, _KEYS)
        net = WorldClipNet(video=config["video"], text=config["text"], embedding=config["embedding"])
        load_weights(net, folder)
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>")
        self.size, self.frames, self.length = config["size"], config["video"]["frames"], config["text"]["length"]
        return net

    def __call__(self, prompts: Sequence[str], completions: Sequence[Clip]) -> list[float]:
        """Score clips of any size and length."""
        texts, clips = self.embed_text(prompts), self.embed_video(completions)
        return [float(score) for score in (texts * clips).sum(-1)]

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts, (N,E) on the reward's device."""
        net = self.net
        encoded = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        )
        vectors: Tensor = net.embed_text(encoded["input_ids"].to(self.device))
        return vectors

    def embed_video(self, completions: Sequence[Clip]) -> Tensor:
        """Embed clips of any size and length, (N,E) on the reward's device."""
        net = self.net
        ready = [prepare(clip, self.frames, self.size, self.device).to(self.dtype) for clip in completions]
        rows_of: dict[int, list[int]] = {}
        for row, clip in enumerate(ready):
            rows_of.setdefault(len(clip), []).append(row)
        parts = {
            row: vector
            for rows in rows_of.values()
            for row, vector in zip(rows, net.embed_video(torch.stack([ready[r] for r in rows])), strict=True)
        }
        return torch.stack([parts[row] for row in range(len(ready))])


def save_world_clip(net: WorldClipNet, tokenizer: Any, config: dict[str, Any], folder: Path) -> None:
    """Write the folder that `WorldClip` loads; `config` contains the arguments of the network and `size`."""
    save_net(net, config, folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
