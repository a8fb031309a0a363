"""A judge of appearance and motion in the synthetic world, without a prompt, trained on pairs of graded corruptions.

The judge has two heads, like VideoAlign's VQ and MQ (arXiv:2501.13918). `visual` decreases with faults visible in one
frame (blur, noise, wrong outlines and colours, ghosts, specks). `motion` decreases with faults across frames (flicker;
bodies that vanish, jump, tremble or change; floating; false collisions). It is learned, and therefore exploitable.
Scores are in standard deviations of clean renders (one value for both heads): 0 is a typical render, less is worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgen.rewards.base import Clip, RewardModel, streaming
from postgen.rewards.world_net import VideoTower, load_weights, prepare, read_config, reward_folder

FOLDER = "world-judge"
HEADS = ("visual", "motion")
_KEYS = {"video", "size", "mean", "std"}


class WorldJudgeNet(nn.Module):
    """A video encoder with a linear head for each of `HEADS`.

    Args:
        video: arguments of `VideoTower`.
    """

    def __init__(self, *, video: dict[str, Any]) -> None:
        super().__init__()
        self.video = VideoTower(**video)
        self.heads = nn.Linear(video["width"], len(HEADS))

    def forward(self, clips_BT3HW: Tensor) -> Tensor:
        """Return the raw scores (B,2)."""
        scores: Tensor = self.heads(self.video(clips_BT3HW)).float()
        return scores


@streaming
class WorldJudge(RewardModel):
    """Scores of appearance (`visual`) and `motion`, and their mean, `overall`.

    Args:
        model: folder exported by the method `world_judge`; None uses the weights of the package.
        device, dtype: see `RewardModel`.
    """

    name = "world_judge"
    outputs = ("overall", *HEADS)

    def __init__(self, *, model: str | Path | None = None, **place: Any) -> None:
        super().__init__(**place)
        self.model = model
        self.size = self.frames = 0
        self.mean, self.std = torch.zeros(2), 1.0

    def build(self) -> nn.Module:
        """Load the network from the folder.

        Raises:
            UserError: the weights are missing or those of another model.
        """
        folder = reward_folder(self.model, FOLDER)
        config = read_config(folder, _KEYS)
        net = WorldJudgeNet(video=config["video"])
        load_weights(net, folder)
        self.size, self.frames = config["size"], config["video"]["frames"]
        self.mean, self.std = torch.tensor(config["mean"]), float(config["std"])
        return net

    def __call__(self, completions: Sequence[Clip]) -> dict[str, list[float]]:
        """Score clips of any size and length."""
        net = self.net
        ready = [prepare(clip, self.frames, self.size, self.device).to(self.dtype) for clip in completions]
        scores = torch.zeros(len(ready), len(HEADS))
        for length in sorted({len(clip) for clip in ready}):
            rows = [row for row, clip in enumerate(ready) if len(clip) == length]
            scores[rows] = net(torch.stack([ready[row] for row in rows])).cpu()
        scores = (scores - self.mean) / self.std
        heads = {name: scores[:, k].tolist() for k, name in enumerate(HEADS)}
        return {"overall": scores.mean(1).tolist(), **heads}
