"""Noise levels: where the steps of a sampler begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families import Denoiser, PredictionType

SigmaSchedule = Literal["pipeline", "linspace"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Levels:
    """Where steps begin and end, one entry a row, float64."""

    s: Tensor
    """(B,) noise level before the step: what the network is told."""
    after: Tensor
    """(B,) noise level after it."""
    second: Tensor
    """() second noise level of the schedule, where the pole at 1 is cut off."""
    alpha_bar: Tensor | None = None
    """(B,) alpha-bar before the step, for models that have one."""
    alpha_bar_after: Tensor | None = None
    """(B,) alpha-bar after it."""

    def mix(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return (clean, noise) factors of the latents before and after the step: x = clean x0 + noise e."""
        if self.alpha_bar is None or self.alpha_bar_after is None:
            return (1 - self.s, self.s), (1 - self.after, self.after)
        before, after = self.alpha_bar, self.alpha_bar_after
        return (before.sqrt(), (1 - before).sqrt()), (after.sqrt(), (1 - after).sqrt())


@dataclass(frozen=True, slots=True)
class Schedule:
    """Noise levels of a rollout.

    Raises:
        UserError: fewer than two steps, or levels that do not fall.
    """

    sigmas: Tensor
    """(T + 1,) float64, falling to 0."""
    prediction_type: PredictionType = "flow"
    """What the network predicts."""
    alpha_bars: Tensor | None = None
    """(T + 1,) float64, for models that are no flow."""

    def __post_init__(self) -> None:
        if len(self.sigmas) < 3 or not bool((self.sigmas[1:] < self.sigmas[:-1]).all()):
            raise UserError(f"a rollout needs at least 2 steps of falling noise, got {self.sigmas.tolist()}")

    @property
    def steps(self) -> int:
        """Transitions."""
        return len(self.sigmas) - 1

    def levels(self, start: Tensor, stop: Tensor) -> Levels:
        """Return the levels of steps from index `start` to index `stop`, (B,) each."""
        bars = self.alpha_bars
        return Levels(
            s=self.sigmas[start],
            after=self.sigmas[stop],
            second=self.sigmas[1],
            alpha_bar=None if bars is None else bars[start],
            alpha_bar_after=None if bars is None else bars[stop],
        )


def schedule_of(denoiser: Denoiser, steps: int, shape: Sequence[int] | None = None) -> Schedule:
    """Return the noise levels that a denoiser's pipeline would use for so many steps on latents of a shape."""
    sigmas = denoiser.sigmas(steps, shape)
    kind = denoiser.prediction_type
    bars = None if kind == "flow" else denoiser.alpha_bar(sigmas).double()  # type: ignore[attr-defined]
    return Schedule(sigmas.double(), kind, bars)


def linspace_schedule(denoiser: Denoiser, steps: int, shift: float, device: torch.device) -> Schedule:
    """Return T equal steps from 1 to 0, shifted: s = k t / (1 + (k - 1) t), as DanceGRPO draws its rollouts.

    Pipelines of some flow models put their last level but one close to 0, where a stochastic step leaves more noise
    than the network then believes in; here the last step begins at k / (T + k - 1).

    Raises:
        UserError: the model is no flow.
    """
    if denoiser.prediction_type != "flow":
        predicted = denoiser.prediction_type
        raise UserError(f"sigma_schedule 'linspace' is for flow models, this predicts {predicted}: use 'pipeline'")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device)
    return Schedule(shift * t / (1 + (shift - 1) * t))
