"""Rewards of single frames, applied to clips: some frames of a clip are scored, and their scores are joined."""

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
"""Name -> function of scores (..., K) over the frames. min and mean-std penalise a clip for single bad frames."""


def uniform_frames(clip: Clip, count: int) -> Tensor:
    """Return `count` equally spaced frames, including the first and the last; all frames if the clip has no more.

    Args:
        clip: (F,3,H,W), or a long video whose frames are read when they are needed.
        count: at least 1; for 1, the first frame is returned.
    >>> uniform_frames(torch.arange(9.0).view(9, 1, 1, 1), 3).flatten().tolist()
    [0.0, 4.0, 8.0]
    """
    if isinstance(clip, Footage):
        return clip.frames(_uniform(len(clip), count).tolist())
    return clip if count >= len(clip) else clip[_uniform(len(clip), count).to(clip.device)]


def _uniform(length: int, count: int) -> Tensor:
    return torch.linspace(0, length - 1, min(count, length)).round().long()


def in_windows(clip: Clip, overlap: int = 0, step: int = 1) -> Iterator[Tensor]:
    """Yield every `step`-th frame of a clip: a tensor in one piece, a `Footage` in windows."""
    if isinstance(clip, Footage):
        yield from clip.windows(overlap, step)
    else:
        yield clip[::step]


def mean_over(parts: Sequence[tuple[float, int]]) -> float:
    """Return the mean over a clip from the (mean, count) of each of its windows."""
    if len(parts) == 1:
        return parts[0][0]
    return sum(mean * count for mean, count in parts) / sum(count for _, count in parts)


def check_frames(frames: int, reduce: str) -> None:
    """Check the two settings of a reward of single frames.

    Raises:
        UserError: fewer than one frame, or an unknown way of joining the scores.
    """
    check_number("frames", frames, 1, whole=True)
    if not isinstance(reduce, str) or reduce not in REDUCTIONS:
        raise UserError(f"unknown reduce {shown(reduce)}: allowed are {', '.join(REDUCTIONS)}")


@streaming
class FrameReward(RewardModel):
    """Base class of the rewards that score single frames: a subclass implements `frame_scores`.

    Args:
        frames: number of frames per clip that are scored (`uniform_frames`).
        reduce: how their scores are joined, a name from `REDUCTIONS`.
        device, dtype: see `RewardModel`.
    """

    def __init__(self, *, frames: int = 4, reduce: str = "mean", **place: Any) -> None:
        super().__init__(**place)
        check_frames(frames, reduce)
        self.frames, self.reduce = frames, reduce

    @abstractmethod
    def frame_scores(self, frames_BK3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score K frames (float32 in [0,1], on `device`) of each of B clips of one size, with a prompt each: (B,K)."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[Clip]) -> list[float | None]:
        """Score clips of any size; clips of one size form a batch."""
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
