"""Rewards of single pictures, applied to clips: some frames of each are scored, and the scores joined into one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError, check_number, shown
from postgen.rewards.base import RewardModel

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(-1),
    "min": lambda x: x.amin(-1),
    "mean-std": lambda x: x.mean(-1) - x.std(-1, correction=0),
}
"""Name -> function of scores (..., K) over the frames. min and mean-std punish a clip for its single bad frames."""


def uniform_frames(clip: Tensor, count: int) -> Tensor:
    """Return `count` frames at equal distances, the first and the last among them; all when there are no more.

    Args:
        clip: (F,3,H,W).
        count: at least 1; one frame is the first.

    >>> uniform_frames(torch.arange(9.0).view(9, 1, 1, 1), 3).flatten().tolist()
    [0.0, 4.0, 8.0]
    """
    if count >= len(clip):
        return clip
    return clip[torch.linspace(0, len(clip) - 1, count).round().long().to(clip.device)]


def check_frames(frames: int, reduce: str) -> None:
    """Check the two settings of a reward of frames.

    Raises:
        UserError: fewer than one frame, or an unknown way to join the scores.
    """
    check_number("frames", frames, 1, whole=True)
    if not isinstance(reduce, str) or reduce not in REDUCTIONS:
        raise UserError(f"unknown reduce {shown(reduce)}: known are {', '.join(REDUCTIONS)}")


class FrameReward(RewardModel):
    """Base of the rewards that score single pictures: a subclass writes `frame_scores`.

    Args:
        frames: how many frames of a clip are scored (`uniform_frames`).
        reduce: how their scores are joined, a name from `REDUCTIONS`.
        device, dtype: as `RewardModel`.
    """

    def __init__(self, *, frames: int = 4, reduce: str = "mean", **place: Any) -> None:
        super().__init__(**place)
        check_frames(frames, reduce)
        self.frames, self.reduce = frames, reduce

    @abstractmethod
    def frame_scores(self, frames_BK3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score the K frames of B clips of one size, float32 in [0,1] on `device`, with one prompt a clip: (B,K)."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[Tensor]) -> list[float | None]:
        """Score clips of any sizes, each size as one batch."""
        picked = [uniform_frames(clip, self.frames) for clip in completions]
        rows_of: dict[torch.Size, list[int]] = {}
        for row, clip in enumerate(picked):
            rows_of.setdefault(clip.shape, []).append(row)
        scores: list[float | None] = [None] * len(picked)
        self.load()
        for rows in rows_of.values():
            batch = torch.stack([picked[row].to(self.device, torch.float32) for row in rows])
            values = self.frame_scores(batch, [prompts[row] for row in rows]).float()
            for row, value in zip(rows, REDUCTIONS[self.reduce](values).tolist(), strict=True):
                scores[row] = value
        return scores
