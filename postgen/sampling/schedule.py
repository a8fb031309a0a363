"""Noise levels: where the steps of a sampler begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families import Denoiser, PredictionType

SigmaSchedule = Literal["pipeline", "linspace"]
"""The noise levels of the pipeline's scheduler, or equal steps from 1 to 0, shifted (`linspace_schedule`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Levels:
    """Where steps begin and end, float64: one entry a row (B,), or one a row and latent frame (B, T)."""

    s: Tensor
    """(B,) or (B, T) noise level before the step: what the network is told."""
    after: Tensor
    """Noise level after it, of the same shape."""
    second: Tensor
    """() second noise level of the schedule, where the pole at 1 is cut off."""
    alpha_bar: Tensor | None = None
    """Alpha-bar before the step, of the shape of `s`, for models that have one."""
    alpha_bar_after: Tensor | None = None
    """Alpha-bar after it."""
    frame_axis: int | None = None
    """Axis of the latents, batch included, along which T runs; only levels of shape (B, T) need it."""

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
    """(S + 1,) float64, falling to 0."""
    prediction_type: PredictionType = "flow"
    """What the network predicts."""
    alpha_bars: Tensor | None = None
    """(S + 1,) float64, for models that are no flow."""
    frame_axis: int | None = None
    """Frame axis of the latents, see `Levels.frame_axis`."""

    def __post_init__(self) -> None:
        if len(self.sigmas) < 3 or not bool((self.sigmas[1:] < self.sigmas[:-1]).all()):
            raise UserError(f"a rollout needs at least 2 steps of falling noise, got {self.sigmas.tolist()}")

    @property
    def steps(self) -> int:
        """Steps from the first noise level to 0."""
        return len(self.sigmas) - 1

    def levels(self, start: Tensor, stop: Tensor) -> Levels:
        """Return the levels of steps from indices `start` to indices `stop`, (B,) or (B, T) each."""
        bars = self.alpha_bars
        return Levels(
            s=self.sigmas[start],
            after=self.sigmas[stop],
            second=self.sigmas[1],
            alpha_bar=None if bars is None else bars[start],
            alpha_bar_after=None if bars is None else bars[stop],
            frame_axis=self.frame_axis,
        )


def schedule_of(denoiser: Denoiser, steps: int, shape: Sequence[int] | None = None) -> Schedule:
    """Return the noise levels that a denoiser's pipeline would use.

    Args:
        denoiser: the model.
        steps: their number.
        shape: of one sample's latents, for schedules that depend on the size.

    Raises:
        UserError: the schedule depends on the size and `shape` is not given, or `steps` is less than 2.
    """
    sigmas = denoiser.sigmas(steps, shape)
    kind = denoiser.prediction_type
    bars = None if kind == "flow" else denoiser.alpha_bar(sigmas).double()
    return Schedule(sigmas.double(), kind, bars, denoiser.frame_axis)


def linspace_schedule(denoiser: Denoiser, steps: int, shift: float, device: torch.device) -> Schedule:
    """Return S equal steps from 1 to 0, shifted: s = k t / (1 + (k - 1) t), as DanceGRPO draws its rollouts.

    Pipelines of some flow models put their last level but one close to 0, where a stochastic step leaves more noise
    than the network is then told of; here the last step begins at k / (S + k - 1).

    Raises:
        UserError: the model is no flow.
    """
    if denoiser.prediction_type != "flow":
        predicted = denoiser.prediction_type
        raise UserError(f"sigma_schedule 'linspace' is for flow models, this predicts {predicted}: use 'pipeline'")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device)
    return Schedule(shift * t / (1 + (shift - 1) * t), frame_axis=denoiser.frame_axis)


def chosen_schedule(
    kind: SigmaSchedule, denoiser: Denoiser, pipe: Any, steps: int, shape: Sequence[int], device: torch.device
) -> Schedule:
    """Return the noise levels that a configuration names.

    Args:
        kind: which levels.
        denoiser: the model.
        pipe: its pipeline; `linspace` reads the shift of its scheduler.
        steps: their number.
        shape: of one sample's latents.
        device: of the levels.

    Raises:
        UserError: `linspace` for a model that is no flow, or for a scheduler without one shift of its own.
    """
    if kind == "pipeline":
        return schedule_of(denoiser, steps, shape)
    config = pipe.scheduler.config
    shift = config.get("flow_shift", config.get("shift"))
    if shift is None or config.get("use_dynamic_shifting", False):
        raise UserError("sigma_schedule 'linspace': this pipeline has no one shift of its own, give flow_shift")
    return linspace_schedule(denoiser, steps, shift, device)


def shifted(scheduler: Any, shift: float) -> Any:
    """Return a diffusers scheduler like this one with another shift of its noise levels.

    Raises:
        UserError: the scheduler has no shift.
    """
    name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
    if name not in scheduler.config:
        raise UserError(f"flow_shift: {type(scheduler).__name__} has no shift, leave it out")
    # A shift that follows from the size of the picture (FLUX) would win over it.
    own = {"use_dynamic_shifting": False} if scheduler.config.get("use_dynamic_shifting", False) else {}
    return type(scheduler).from_config(scheduler.config, **{name: shift}, **own)
