"""Transitions: one step x -> y of a diffusion sampler as a Gaussian with a density.

All published flow SDEs have the form (K1). s is the noise level, s' the next one, D = s - s' > 0, v = noise - clean
the prediction, e = x + (1 - s) v the noise in x, x0 = x - s v the clean latents, z standard normal noise:

    mean = x - D (v + g^2 / (2 s) e)     std = g sqrt(D)     y = mean + std z                                     (K1)
    log p(y|x) = reduce(-(y - mean)^2 / (2 std^2) - log std - log(2 pi) / 2)                                      (K2)

    dance     g = a                            DanceGRPO, arXiv:2505.07818, eq. 8
    flow      g = a sqrt(s / (1 - s))          Flow-GRPO, arXiv:2505.05470, eq. 9
    flow_wan  g = a s_1 s                      Flow-GRPO's code for Wan, a = 1; s_1 is the second noise level
    exact     std^2 = a^2 (log((1 - s') / (1 - s)) - D), the integral of flow's g^2; SAGE, arXiv:2603.21872
    cps       std = s' sin(a pi / 2), y = (1 - s') x0 + sqrt(s'^2 - std^2) e + std z; arXiv:2509.05952
    ddim      for models with alpha-bar A: std = a sqrt((1 - A') / (1 - A) (1 - A / A')); arXiv:2010.02502, eq. 12, 16
    ode       no noise: Euler step; for models with alpha-bars the ddim step with a = 0

`a` is the strength of the noise. `flow` and `exact` have a pole at s = 1. Near it, the formulas use 1 minus the second
noise level as the smallest value of 1 - s, and `exact`, whose integral diverges, uses the formula of `flow`. Sampling
and training call the same function, so the probability ratio of an unchanged policy is 1.

Noise levels are given per row, (B,), or per row and latent frame, (B, T); "per level" in this file means either shape.
A frame that is clean before and after a step (s = s' = 0) is returned unchanged, bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families import PredictionType

from .schedule import Levels, Schedule

Kind = Literal["dance", "flow", "flow_wan", "exact", "cps", "ddim", "ode"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NOISE_LEVEL: dict[Kind, float] = {
    "dance": 0.3,
    "flow": 0.7,
    "flow_wan": 1.0,
    "exact": 0.7,
    "cps": 0.8,
    "ddim": 1.0,
    "ode": 0.0,
}
"""Published strength `a` of the noise of each kind."""

Reduction = Literal["mean", "sum", "sqrt"]
"""Reduction of log-probabilities over the n values of a latent: mean, sum, or sum divided by sqrt(n)."""
Weighting = Literal["none", "std", "inv_grad"]
"""Loss weights of the steps, see `step_weights`."""


def overshooting(kind: Kind, schedule: Schedule, noise_level: float, steps: Sequence[int]) -> list[int]:
    """Return the step indices whose added noise has a std of more than four times the noise level after the step.

    At the next step the network receives a noise level that is only a fraction of the noise in the latents. For the
    embedded model, twice the level did no harm to clips, and 50 times the level ruined them.

    Args:
        kind: kind of the transition.
        schedule: the noise levels.
        noise_level: strength a of the noise.
        steps: step indices to check.
    """
    index = torch.as_tensor(list(steps), device=schedule.sigmas.device)
    levels = schedule.levels(index, index + 1)
    nothing = torch.zeros(len(index), 1, dtype=torch.float64, device=index.device)
    std = transition(kind, nothing, nothing, levels, noise_level, schedule.prediction_type).std
    _, (_, after) = levels.mix()
    return index[std > 4 * after].tolist()


@dataclass(frozen=True, slots=True)
class Transition:
    """A step as a Gaussian over the next latents."""

    mean: Tensor
    """(B, ...) mean of the next latents."""
    std: Tensor
    """(B,) or (B, T) standard deviation, 0 for a step without noise."""
    clean: Tensor
    """(B, ...) estimate of the clean latents."""
    slope: Tensor
    """(B,) or (B, T) derivative of the mean by the prediction, at most 0 for flow models."""
    has_scale: bool
    """Whether the log-probability contains the variance; false for `cps` only."""
    frame_axis: int | None = None
    """Axis of the latents with the T latent frames."""

    def sample(self, noise: Tensor) -> Tensor:
        """Return the next latents (B, ...) for standard normal noise of that shape."""
        return self.mean + wide(self.std, self.mean, self.frame_axis) * noise

    def log_prob(self, y: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Return the (B,) log-probabilities (K2) of next latents `y`, reduced over all other dimensions.

        For `cps` the factor 1 / (2 std^2) and the constants are left out, as published. With noise levels per frame,
        frames without noise have no density and are left out of sums and means.
        """
        square = (y - self.mean).square()
        counted = None
        std = wide(self.std, y, self.frame_axis)
        if self.std.dim() > 1:
            counted = (std > 0).expand_as(square)
            std = torch.where(std > 0, std, 1)
        if not self.has_scale:
            return reduced(-square, reduction, counted)
        values = -square / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi)
        return reduced(values, reduction, counted)

    def gradient_scale(self) -> Tensor:
        """Return, per level, the factor of z in the gradient of the summed log-probability by the prediction.

        This factor weights the steps of a rollout implicitly. It is c_t in arXiv:2605.15980.
        """
        return self.slope.abs() / self.std if self.has_scale else 2 * self.std * self.slope.abs()


def reduced(values: Tensor, reduction: Reduction, counted: Tensor | None = None) -> Tensor:
    """Reduce (B, ...) to (B,): the mean, the sum, or the sum divided by the square root of the number of values.

    Args:
        values: (B, ...) values.
        reduction: "mean", "sum" or "sqrt".
        counted: (B, ...) bool mask of the values to include; None includes all. A row without included values gives 0.
    """
    if counted is not None:
        total = torch.where(counted, values, 0).flatten(1).sum(1)
        number = counted.flatten(1).sum(1).clamp_min(1).to(values.dtype)
        return total / (number if reduction == "mean" else number**0.5) if reduction != "sum" else total
    flat = values.flatten(1)
    if reduction == "mean":
        return flat.mean(1)
    return flat.sum(1) if reduction == "sum" else flat.sum(1) / math.sqrt(flat.shape[1])


def split(x: Tensor, prediction: Tensor, levels: Levels, prediction_type: PredictionType) -> tuple[Tensor, Tensor]:
    """Return the clean latents and the noise, both (B, ...), that a prediction for the latents `x` implies."""
    (clean, noise), _ = levels.mix()
    axis = levels.frame_axis
    a, b = wide(clean, x, axis), wide(noise, x, axis)
    if prediction_type == "flow":
        return x - b * prediction, x + a * prediction
    if prediction_type == "epsilon":
        return (x - b * prediction) / a, prediction
    if prediction_type == "v_prediction":
        return a * x - b * prediction, a * prediction + b * x
    # Prediction of the clean latents. At noise level 0, x itself is clean, whatever the network predicts.
    return torch.where(b > 0, prediction, x), (x - a * prediction) / torch.where(b > 0, b, 1)


def transition(
    kind: Kind,
    x: Tensor,
    prediction: Tensor,
    levels: Levels,
    noise_level: float,
    prediction_type: PredictionType = "flow",
) -> Transition:
    """Return the Gaussian of one step of every row.

    Args:
        kind: formula of the step, see the module docstring.
        x: (B, ...) latents, float32 or float64. In half precision the ratio of an unchanged policy would not be 1.
        prediction: (B, ...) prediction of the network for x; converted to the dtype of x.
        levels: noise levels before and after the step, (B,), or (B, T) for noise levels per frame.
        noise_level: strength a of the noise, see `NOISE_LEVEL`.
        prediction_type: what the network predicts.

    Raises:
        ValueError: the latents have half precision, or levels per frame do not fit the latents.
        UserError: the kind does not fit the prediction type.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"latents must be float32 or float64, got {x.dtype}")
    check_kind(kind, prediction_type)
    prediction = prediction.to(x.dtype)
    clean, noise = split(x, prediction, levels, prediction_type)
    if levels.alpha_bar is not None or kind == "cps":
        return _mixed(kind, clean, noise, levels, noise_level, prediction_type)
    variance = _variance(kind, levels, noise_level)
    delta, s, axis = levels.s - levels.after, levels.s, levels.frame_axis
    pull = variance / (2 * _divisor(s))  # D g^2 / (2 s)
    mean = x - wide(delta, x, axis) * prediction - wide(pull, x, axis) * noise
    return Transition(mean, variance.sqrt(), clean, -(delta + pull * (1 - s)), True, axis)


def check_kind(kind: Kind, prediction_type: PredictionType) -> None:
    """Check that a kind of transition fits a prediction type.

    Raises:
        UserError: the kind does not fit; the message names the kinds that do.
    """
    allowed = [k for k in KINDS if (k != "ddim" if prediction_type == "flow" else k in ("ddim", "ode"))]
    if kind not in allowed:
        with_noise = ", ".join(k for k in allowed if k != "ode")
        raise UserError(f"sde_type {kind!r} is not for a model that predicts {prediction_type}: use {with_noise}")


def _variance(kind: Kind, levels: Levels, a: float) -> Tensor:
    """Return the variance std^2 = g^2 D per level, float64, of the kinds that follow (K1)."""
    s, delta = levels.s, levels.s - levels.after
    if kind == "ode":
        return torch.zeros_like(s)
    if kind == "dance":
        return a**2 * delta
    if kind == "flow_wan":
        return (a * levels.second * s) ** 2 * delta
    kept = torch.maximum(1 - s, 1 - levels.second)
    flow = a**2 * s / kept * delta
    if kind == "flow":
        return flow
    integral = a**2 * (((1 - levels.after) / kept).log() - delta)
    return torch.where(1 - s < 1 - levels.second, flow, integral)


def _mixed(
    kind: Kind, clean: Tensor, noise: Tensor, levels: Levels, a: float, prediction_type: PredictionType
) -> Transition:
    """Return a step that mixes the estimates of clean latents and noise: cps, ddim, and ode with alpha-bars."""
    (clean_before, noise_before), (clean_after, noise_after) = levels.mix()
    if kind == "cps":
        std = levels.after * math.sin(a * math.pi / 2)
    elif kind == "ode":
        std = torch.zeros_like(levels.s)
    else:
        # 1 - A / A', written with the factors sqrt(A) and sqrt(A'): A may be 0, and A' may be 1.
        std = a * (noise_after / _divisor(noise_before)) * (1 - (clean_before / clean_after).square()).sqrt()
    kept = (noise_after.square() - std.square()).clamp_min(0).sqrt()
    axis = levels.frame_axis
    mean = wide(clean_after, clean, axis) * clean + wide(kept, noise, axis) * noise
    by_clean, by_noise = _slopes(clean_before, noise_before, prediction_type)
    return Transition(mean, std, clean, clean_after * by_clean + kept * by_noise, kind != "cps", axis)


def _slopes(clean: Tensor, noise: Tensor, prediction_type: PredictionType) -> tuple[Tensor, Tensor]:
    """Return the derivatives of the clean latents and of the noise (`split`) by the prediction, per level."""
    if prediction_type in ("flow", "v_prediction"):
        return -noise, clean
    if prediction_type == "epsilon":
        return -noise / clean, torch.ones_like(noise)
    return torch.ones_like(noise), -clean / _divisor(noise)


def step_weights(
    kind: Kind, schedule: Schedule, noise_level: float, weighting: Weighting, steps: Sequence[int], *, guard: bool
) -> Tensor:
    """Return the (S,) loss weights of the steps, with mean 1 over `steps` and 0 elsewhere.

    Args:
        kind: kind of the stochastic transitions.
        schedule: noise levels of the S steps.
        noise_level: strength a of the noise.
        weighting: "none": equal weights. "std": proportional to the std of the noise (TempFlow-GRPO,
            arXiv:2508.04324). "inv_grad": inversely proportional to `Transition.gradient_scale` (Flash-GRPO,
            arXiv:2605.15980), which gives all steps the same gradient scale.
        steps: step indices that may be trained.
        guard: whether the log-ratio is normalised (GRPO-Guard), which rescales the gradient by std / D.
    """
    index = torch.as_tensor(list(steps), device=schedule.sigmas.device)
    levels = schedule.levels(index, index + 1)
    nothing = torch.zeros(len(index), 1, dtype=torch.float64, device=index.device)
    step = transition(kind, nothing, nothing, levels, noise_level, schedule.prediction_type)
    weights = torch.ones_like(step.std)
    if weighting == "std":
        weights = step.std
    elif weighting == "inv_grad":
        scale = step.gradient_scale()
        weights = 1 / (scale * step.std / (levels.s - levels.after) if guard else scale)
    table = torch.zeros(schedule.steps, dtype=torch.float64, device=index.device)
    table[index] = weights / weights.mean()
    return table


def wide(values: Tensor, like: Tensor, frame_axis: int | None = None) -> Tensor:
    """Reshape values per level so that they broadcast with latents, and convert them to the latents' dtype.

    Args:
        values: (B,), or (B, T) for T latent frames.
        like: (B, ...) latents.
        frame_axis: axis of `like` with the T latent frames; needed for (B, T) only.

    Raises:
        ValueError: values (B, T) without a frame axis, or with a T that differs from the frames of the latents.
    """
    shape = [-1, *[1] * (like.dim() - 1)]
    if values.dim() > 1:
        if frame_axis is None:
            raise ValueError("noise levels per frame, (B, T), need a schedule with a frame_axis")
        if values.shape[1] != like.shape[frame_axis]:
            found, frames = tuple(values.shape), like.shape[frame_axis]
            raise ValueError(f"noise levels per frame must be (B, {frames}) for these latents, got {found}")
        shape[frame_axis] = values.shape[1]
    return values.to(like.dtype).view(shape)


def _divisor(values: Tensor) -> Tensor:
    """Replace 0 by 1 in levels that are divisors. Level 0 means a clean frame, whose numerator is 0 as well."""
    return torch.where(values > 0, values, 1)
