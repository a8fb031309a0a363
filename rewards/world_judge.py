"""A judge of looks and of motion in the synthetic world, without a prompt: learned from pairs of graded corruptions.

Two heads, as VideoAlign's VQ and MQ (arXiv:2501.13918): `visual` falls with what one frame shows (blur, noise, wrong
outlines and colours, ghosts, specks), `motion` with what several show (flicker, bodies that vanish, leap, tremble or
change, floating, collisions that are none). Learned, and therefore hackable. Scores are in standard deviations of
clean renders (one for both heads): 0 is a usual render, less is worse.
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
    """A video tower with a linear head for each of `HEADS`.

    Args:
        video: arguments of `VideoTower`.
    """

    def __init__(self, *, video: dict[str, Any]) -> None:
        super().__init__()
        self.video = VideoTower(**video)
        self.heads = nn.Linear(video["width"], len(HEADS))

    def forward(self, clips_BT3HW: Tensor) -> Tensor:
        """Return raw scores (B,2)."""
        scores: Tensor = self.heads(self.video(clips_BT3HW)).float()
        return scores


@streaming
class WorldJudge(RewardModel):
    """Scores of looks and motion, and `overall`, their mean.

    Args:
        model: folder of an export of the method `world_judge`; None takes the weights that are shipped.
        device, dtype: as `RewardModel`.
    """

    name = "world_judge"
    outputs = ("overall", *HEADS)

    def __init__(self, *, model: str | Path | None = None, **place: Any) -> None:
        super().__init__(**place)
        self.model = model
        self.size = self.frames = 0
        self.mean, self.std = torch.zeros(2), 1.0

    def build(self) -> nn.Module:
        """Read the folder.

        Raises:
            UserError: no weights, or weights of another model.
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
