"""Noise levels: the schedule of a sampler, and the levels at which its steps begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families import Denoiser, PredictionType, RoundingDenoiser

SigmaSchedule = Literal["pipeline", "linspace"]
"""Source of the noise levels: the pipeline's scheduler, or `linspace_schedule`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Levels:
    """Noise levels before and after a step, float64: one per row, (B,), or one per row and latent frame, (B, T)."""

    s: Tensor
    """(B,) or (B, T) noise level (sigma) before the step."""
    after: Tensor
    """(B,) or (B, T) noise level after the step."""
    second: Tensor
    """() second noise level of the schedule. Formulas with a pole at level 1 use it there instead of 1."""
    alpha_bar: Tensor | None = None
    """(B,) or (B, T) alpha-bar before the step; None for flow models."""
    alpha_bar_after: Tensor | None = None
    """(B,) or (B, T) alpha-bar after the step; None for flow models."""
    frame_axis: int | None = None
    """Axis of the latents (B, ...) with the T latent frames, counted with the batch axis; needed for levels (B, T)."""

    def mix(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return the factors (a, b) of x = a clean + b noise, before and after the step, of the shape of `s`."""
        if self.alpha_bar is None or self.alpha_bar_after is None:
            return (1 - self.s, self.s), (1 - self.after, self.after)
        before, after = self.alpha_bar, self.alpha_bar_after
        return (before.sqrt(), (1 - before).sqrt()), (after.sqrt(), (1 - after).sqrt())


@dataclass(frozen=True, slots=True)
class Schedule:
    """Noise levels of the S steps of a sampler.

    Raises:
        UserError: there are fewer than two steps, or the levels do not strictly fall.
    """

    sigmas: Tensor
    """(S + 1,) float64 noise levels, falling to 0; step i goes from entry i to entry i + 1."""
    prediction_type: PredictionType = "flow"
    """What the network predicts."""
    alpha_bars: Tensor | None = None
    """(S + 1,) float64 alpha-bars; None for flow models."""
    frame_axis: int | None = None
    """Frame axis of the latents, see `Levels.frame_axis`."""
    network_sigmas: Tensor | None = None
    """(S + 1,) float64 noise levels that the network receives if the pipeline rounds timesteps; None: `sigmas`."""

    def __post_init__(self) -> None:
        if len(self.sigmas) < 3 or not bool((self.sigmas[1:] < self.sigmas[:-1]).all()):
            raise UserError(
                f"a rollout needs at least 2 steps with falling noise levels, got levels {self.sigmas.tolist()}"
            )

    @property
    def steps(self) -> int:
        """Number of steps S from the first noise level to 0."""
        return len(self.sigmas) - 1

    def received(self, start: Tensor) -> Tensor:
        """Return the noise levels that the network receives at step indices, (B,) or (B, T), to pass to `predict`."""
        if self.network_sigmas is not None:
            return self.network_sigmas[start]
        return self.sigmas[start].to(torch.float32)

    def levels(self, start: Tensor, stop: Tensor) -> Levels:
        """Return the noise levels of steps from step indices `start` to step indices `stop`, both (B,) or (B, T)."""
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
    """Return the schedule that a denoiser's pipeline uses.

    Args:
        denoiser: the model.
        steps: number of steps.
        shape: shape of one sample's latents, without the batch axis; needed if the schedule depends on the size.

    Raises:
        UserError: the schedule depends on the size and `shape` is None, or `steps` is less than 2.
    """
    sigmas = denoiser.sigmas(steps, shape)
    kind = denoiser.prediction_type
    bars = None if kind == "flow" else denoiser.alpha_bar(sigmas).double()
    received = denoiser.network_sigmas(steps, shape) if isinstance(denoiser, RoundingDenoiser) else None
    return Schedule(sigmas.double(), kind, bars, denoiser.frame_axis, received)


def linspace_schedule(denoiser: Denoiser, steps: int, shift: float, device: torch.device) -> Schedule:
    """Return a schedule of equal steps from 1 to 0, shifted: s = k t / (1 + (k - 1) t). DanceGRPO uses this schedule.

    In some pipelines of flow models the last level before 0 is very small. A stochastic step to such a level leaves
    more noise in the latents than the level that the network receives next. Here the last level before 0 is
    k / (S + k - 1).

    Args:
        denoiser: the model.
        steps: number of steps S.
        shift: shift k of the noise levels, above 0.
        device: device of the levels.

    Raises:
        UserError: the model is not a flow model.
    """
    if denoiser.prediction_type != "flow":
        predicted = denoiser.prediction_type
        raise UserError(
            f"sigma_schedule 'linspace' is for flow models, but this model predicts {predicted}: use 'pipeline'"
        )
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device)
    return Schedule(shift * t / (1 + (shift - 1) * t), frame_axis=denoiser.frame_axis)


def chosen_schedule(
    kind: SigmaSchedule, denoiser: Denoiser, pipe: Any, steps: int, shape: Sequence[int], device: torch.device
) -> Schedule:
    """Return the schedule that a configuration names.

    Args:
        kind: "pipeline" or "linspace".
        denoiser: the model.
        pipe: pipeline of the model; `linspace` reads the shift of its scheduler.
        steps: number of steps.
        shape: shape of one sample's latents, without the batch axis.
        device: device of the levels.

    Raises:
        UserError: `linspace` for a model that is not a flow model, or for a scheduler without a fixed shift.
    """
    if kind == "pipeline":
        return schedule_of(denoiser, steps, shape)
    config = pipe.scheduler.config
    shift = config.get("flow_shift", config.get("shift"))
    if shift is None or config.get("use_dynamic_shifting", False):
        raise UserError("sigma_schedule 'linspace': the pipeline's scheduler has no fixed shift, give flow_shift")
    return linspace_schedule(denoiser, steps, shift, device)


def shifted(scheduler: Any, shift: float) -> Any:
    """Return a copy of a diffusers scheduler with another shift of its noise levels.

    Raises:
        UserError: the scheduler has no setting for a shift.
    """
    name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
    if name not in scheduler.config:
        raise UserError(f"flow_shift: {type(scheduler).__name__} has no shift, leave it out")
    # Dynamic shifting (FLUX), which depends on the size of the image, would override the given shift.
    own = {"use_dynamic_shifting": False} if scheduler.config.get("use_dynamic_shifting", False) else {}
    return type(scheduler).from_config(scheduler.config, **{name: shift}, **own)
