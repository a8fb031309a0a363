"""Rewards composed of other rewards: applied per frame, compared with a threshold, or limited by guards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from postgen.errors import UserError, check_number
from postgen.rewards.base import Clip, Reward
from postgen.rewards.frames import REDUCTIONS, check_frames, uniform_frames
from postgen.rewards.registry import Source, get_reward, get_rewards

_FAR = 1e9
"""Bound for numbers that are compared with scores; every score is closer to 0 than this."""
_SHARED = ("fps", "trainer_state", "log_extra", "log_metric", "log_reasons")


def per_frame(reward: Source, *, frames: int = 4, reduce: str = "mean", name: str | None = None) -> Reward:
    """Turn a reward of images into a reward of clips: the frames are scored as clips of one frame each.

    Args:
        reward: the reward of images.
        frames: number of frames per clip, equally spaced, including the first and the last.
        reduce: how the frame scores are joined: mean, min or mean-std. A clip gets None if one of its frames does.
        name: None uses the name of the inner reward.

    Raises:
        UserError: an unknown reward, fewer than one frame, or an unknown `reduce`.
    """
    return Reward(_PerFrame(get_reward(reward), frames, reduce, name))


def thresholded(reward: Source, bound: float, *, name: str | None = None) -> Reward:
    """Make a binary reward: 1 where another reward is above `bound`, else 0 (arXiv:2505.07818).

    Raises:
        UserError: an unknown reward.
    """
    return Reward(_Thresholded(get_reward(reward), bound, name))


def guarded(
    reward: Source, guards: Sequence[Source] | Source, *, worst: float = 0.0, name: str | None = None
) -> Reward:
    """Limit a reward by guards in [0,1]: worst + (value - worst) * the smallest guard.

    Args:
        reward: the reward to be maximised.
        guards: rewards that are 1 for a sound clip and 0 for an unacceptable one, as in `postgen.rewards.guards`.
        worst: score of a clip for which a guard is 0; choose it no higher than the reward's scores of bad clips.
        name: None uses the name of the inner reward.

    Raises:
        UserError: an unknown reward, no guard, or an async reward.
    """
    parts = [get_reward(reward), *get_rewards(guards)]
    if len(parts) == 1:
        raise UserError(f"guarded({parts[0].name}) has no guard: give at least one")
    return Reward(_Guarded(parts, worst, name))


class _Composed(ABC):
    """A reward that calls the rewards in `parts`; `Reward` reads the requirements of the parts from there."""

    streams = True  # `Reward` passes the whole video to a part that cannot read long videos in windows

    def __init__(self, parts: Sequence[Reward], name: str | None) -> None:
        remote = [part.name for part in parts if part.is_async]
        if remote:
            raise UserError(f"{remote[0]} is async: rewards can only be composed of rewards that are not async")
        self.parts = tuple(parts)
        self.name = name or parts[0].name
        self.groupwise = any(part.groupwise for part in parts)
        self.batch_bytes = min((part.batch_bytes for part in parts if part.batch_bytes), default=None)

    @abstractmethod
    def __call__(self, prompts: Sequence[str], completions: Sequence[Clip], **columns: Any) -> list[float | None]:
        """Score a batch."""

    def load(self, device: torch.device | str | None = None) -> None:
        for part in self.parts:
            part.load(device)

    def offload(self) -> None:
        for part in self.parts:
            part.offload()


class _PerFrame(_Composed):
    def __init__(self, inner: Reward, frames: int, reduce: str, name: str | None) -> None:
        super().__init__([inner], name)
        check_frames(frames, reduce)
        self.frames, self.reduce = frames, reduce

    def __call__(self, prompts: Sequence[str], completions: Sequence[Clip], **columns: Any) -> list[float | None]:
        pictures = [uniform_frames(clip, self.frames).split(1) for clip in completions]
        row_of = [row for row, split in enumerate(pictures) for _ in split]
        columns = {k: v if k in _SHARED or v is None else [v[row] for row in row_of] for k, v in columns.items()}
        # Logged values would belong to single frames, for which the caller has no rows.
        columns.pop("log_extra", None)
        columns.pop("log_reasons", None)
        flat = [picture for split in pictures for picture in split]
        values = iter(self.parts[0]([prompts[row] for row in row_of], flat, **columns))
        return [self._joined([next(values) for _ in split]) for split in pictures]

    def _joined(self, scores: list[float | None]) -> float | None:
        known = [score for score in scores if score is not None]
        return float(REDUCTIONS[self.reduce](torch.tensor(known))) if len(known) == len(scores) else None


class _Thresholded(_Composed):
    def __init__(self, inner: Reward, bound: float, name: str | None) -> None:
        super().__init__([inner], name)
        check_number("bound", bound, -_FAR, _FAR)
        self.bound = bound

    def __call__(self, prompts: Sequence[str], completions: Sequence[Clip], **columns: Any) -> list[float | None]:
        scores = self.parts[0](prompts, completions, **columns)
        return [None if score is None else float(score > self.bound) for score in scores]


class _Guarded(_Composed):
    def __init__(self, parts: Sequence[Reward], worst: float, name: str | None) -> None:
        super().__init__(parts, name)
        check_number("worst", worst, -_FAR, _FAR)
        self.worst = worst

    def __call__(self, prompts: Sequence[str], completions: Sequence[Clip], **columns: Any) -> list[float | None]:
        values, *guards = [part(prompts, completions, **columns) for part in self.parts]
        return [self._held(value, row) for value, *row in zip(values, *guards, strict=True)]

    def _held(self, value: float | None, guards: list[float | None]) -> float | None:
        known = [guard for guard in guards if guard is not None]
        if value is None or len(known) < len(guards):
            return None
        return self.worst + (value - self.worst) * min(1.0, max(0.0, min(known)))
