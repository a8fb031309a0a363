"""Rewards of single pictures, applied to clips: some frames of each are scored, and the scores joined into one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError, check_number, shown
from postgen.rewards.base import Clip, RewardModel, streaming
from postgen.video import Footage

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(-1),
    "min": lambda x: x.amin(-1),
    "mean-std": lambda x: x.mean(-1) - x.std(-1, correction=0),
}
"""Name -> function of scores (..., K) over the frames. min and mean-std punish a clip for its single bad frames."""


def uniform_frames(clip: Clip, count: int) -> Tensor:
    """Return `count` frames at equal distances, the first and the last among them; all when there are no more.

    Args:
        clip: (F,3,H,W), or a video that is read where it is looked at.
        count: at least 1; one frame is the first.

    >>> uniform_frames(torch.arange(9.0).view(9, 1, 1, 1), 3).flatten().tolist()
    [0.0, 4.0, 8.0]
    """
    if isinstance(clip, Footage):
        return clip.frames(_uniform(len(clip), count).tolist())
    return clip if count >= len(clip) else clip[_uniform(len(clip), count).to(clip.device)]


def _uniform(length: int, count: int) -> Tensor:
    return torch.linspace(0, length - 1, min(count, length)).round().long()


def in_windows(clip: Clip, overlap: int = 0, step: int = 1) -> Iterator[Tensor]:
    """Yield every `step`-th frame of a clip: in one piece, or of a `Footage` in its windows."""
    if isinstance(clip, Footage):
        yield from clip.windows(overlap, step)
    else:
        yield clip[::step]


def mean_over(parts: Sequence[tuple[float, int]]) -> float:
    """Return the mean of (mean, how many) of the windows of a clip."""
    if len(parts) == 1:
        return parts[0][0]
    return sum(mean * count for mean, count in parts) / sum(count for _, count in parts)


def check_frames(frames: int, reduce: str) -> None:
    """Check the two settings of a reward of frames.

    Raises:
        UserError: fewer than one frame, or an unknown way to join the scores.
    """
    check_number("frames", frames, 1, whole=True)
    if not isinstance(reduce, str) or reduce not in REDUCTIONS:
        raise UserError(f"unknown reduce {shown(reduce)}: known are {', '.join(REDUCTIONS)}")


@streaming
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

    def __call__(self, prompts: Sequence[str], completions: Sequence[Clip]) -> list[float | None]:
        """Score clips of any sizes, each size as one batch."""
        picked: dict[int, Tensor] = {}
        rows_of: dict[torch.Size, list[int]] = {}
        scores: list[float | None] = [None] * len(completions)
        self.load()
        for row, clip in enumerate(completions):
            if isinstance(clip, Footage):
                scores[row] = self._along(clip, prompts[row])
                continue
            picked[row] = uniform_frames(clip, self.frames)
            rows_of.setdefault(picked[row].shape, []).append(row)
        for rows in rows_of.values():
            batch = torch.stack([picked[row].to(self.device, torch.float32) for row in rows])
            values = self.frame_scores(batch, [prompts[row] for row in rows]).float()
            for row, value in zip(rows, REDUCTIONS[self.reduce](values).tolist(), strict=True):
                scores[row] = value
        return scores

    def _along(self, clip: Footage, prompt: str) -> float:
        indices = _uniform(len(clip), self.frames).tolist()
        values = [
            self.frame_scores(part[None].to(self.device, torch.float32), [prompt]).float()[0]
            for part in clip.picked(indices)
        ]
        return float(REDUCTIONS[self.reduce](torch.cat(values)))
