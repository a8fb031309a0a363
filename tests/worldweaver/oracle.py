"""Networks for tests of rollouts: `Oracle` predicts the exact velocity of a known video, `Mixer` mixes all inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.sampling.schedule import Schedule
from postgen.worldweaver.levels import FrameLevels
from postgen.worldweaver.memory import MemoryBank
from postgen.worldweaver.rollout import Rollout
from postgen.worldweaver.segments import Segments
from postgen.worldweaver.state import RolloutState

SHAPE = (4, 2, 3)
"""Latents of one frame (C, h, w): two modalities with two channels each."""


def schedule(steps: int, shift: float = 5.0) -> Schedule:
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return Schedule(shift * t / (1 + (shift - 1) * t))


def clean(frames: int, rows: int = 1, shape: tuple[int, ...] = SHAPE, seed: int = 1) -> Tensor:
    channels, *space = shape
    return torch.randn(rows, channels, frames, *space, generator=torch.Generator().manual_seed(seed))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class Oracle:
    """Predicts noise - clean for the frames in flight of `state`, and records its calls."""

    def __init__(self, video: Tensor) -> None:
        self.video, self.state = video, None
        self.calls: list[tuple[Tensor, FrameLevels]] = []

    def predict(self, z: Tensor, levels: FrameLevels, condition: dict[str, Tensor], guidance: float) -> Tensor:
        self.calls.append((z, levels))
        start, count = self.state.finished, int(levels.predicted.sum())
        velocity = torch.full_like(z, torch.nan)  # the velocity of memory frames is never used
        sigma = levels.rgb[:, None, levels.predicted, None, None]
        velocity[:, :, -count:] = (z[:, :, -count:] - self.video[:, :, start : start + count]) / sigma
        return velocity


class Mixer:
    """Predicts a mixture of all inputs: memory, levels, roles, prompt, guidance. Batch rows are independent."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def predict(self, z: Tensor, levels: FrameLevels, condition: dict[str, Tensor], guidance: float) -> Tensor:
        self.told.append(float(condition["prompt"].flatten()[0]))
        level = levels.sigma.sum(-1) + levels.role  # (B, T)
        along = z.cumsum(2) + level[:, None, :, None, None]
        along = along / (1 + along.square())
        mixed = along - 0.5 * along.roll(1, 1) + 0.25 * z
        prompt = condition["prompt"][:, :, None, None, None]
        answer = mixed + prompt
        return mixed + guidance * (answer - mixed) if guidance > 1 else answer


def prompt(value: float = 0.5, rows: int = 1) -> dict[str, Tensor]:
    return {"prompt": torch.full((rows, 1), value)}


def rollout(predictor, steps=6, groups=3, frames=2, **words) -> Rollout:
    return Rollout(predictor, schedule(steps), Segments(steps=steps, groups=groups), frames=frames, **words)


def begun(made: Rollout, rows: int = 1, bank: MemoryBank | None = None, shape=SHAPE, **words) -> RolloutState:
    bank = MemoryBank(long=3, short=2, capacity=8) if bank is None else bank
    words.setdefault("prompts", [(0, prompt(rows=rows))])
    words.setdefault("generators", generators(*range(7, 7 + rows)))
    return made.start(shape, words.pop("prompts"), words.pop("generators"), bank, **words)
