"""Estimate of the clean latents in the middle of a diffusers pipeline call, as its network predicts them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_DDIM = ("DDIMScheduler", "CogVideoXDDIMScheduler")
_TO_CLEAN = ("dpmsolver++", "sde-dpmsolver++")


def clean_estimate(scheduler: Any, before: Tensor | None, after: Tensor, step: int) -> Tensor | None:
    """Return the estimate of the clean latents that a scheduler's step used, from the latents around the step.

    Multistep solvers keep their estimates, and the last one is returned. A deterministic first-order step does not
    change the noise estimate. From x0 = a0 clean + b0 noise before the step and x1 = a1 clean + b1 noise after it
    follows clean = (b0 x1 - b1 x0) / (b0 a1 - b1 a0). The estimate includes guidance.

    Args:
        scheduler: the pipeline's scheduler, in the middle of a call.
        before: latents before the step; None if they are unknown, for example at the first step.
        after: latents after the step, of the same shape and dtype.
        step: index of the step, from 0.

    Returns:
        Latents of the shape and dtype of `after`. None if the step adds noise, if this function does not support the
        scheduler, or if `before` is needed but None.
    """
    if _keeps_estimates(scheduler):
        kept = scheduler.model_outputs[-1]
        return None if kept is None else kept.to(after)
    levels = _levels(scheduler, step)
    if levels is None or before is None:
        return None
    (a0, b0), (a1, b1) = levels
    whole = torch.float32 if after.dtype in (torch.float16, torch.bfloat16) else after.dtype
    clean = (b0 * after.to(whole) - b1 * before.to(whole)) / (b0 * a1 - b1 * a0)
    return clean.to(after.dtype)


def estimates_clean(scheduler: Any) -> bool:
    """Return whether `clean_estimate` supports a scheduler."""
    return _keeps_estimates(scheduler) or _kind(scheduler) is not None


def _keeps_estimates(scheduler: Any) -> bool:
    """Return whether a solver's `model_outputs` are estimates of the clean latents (UniPC, DPM-Solver++)."""
    if not hasattr(scheduler, "model_outputs"):
        return False
    config = scheduler.config
    return config.get("predict_x0") is True or config.get("algorithm_type") in _TO_CLEAN


def _kind(scheduler: Any) -> str | None:
    names = [kind.__name__ for kind in type(scheduler).__mro__]
    if "FlowMatchEulerDiscreteScheduler" in names:
        return None if scheduler.config.get("stochastic_sampling") else "flow"
    if any(name in names for name in _DDIM):
        return "alpha_bar"
    return "sigma" if "EulerDiscreteScheduler" in names else None


def _levels(scheduler: Any, step: int) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Return the factors (a, b) of x = a clean + b noise before and after a step; None for unknown schedulers."""
    kind = _kind(scheduler)
    if kind is None:
        return None
    if kind == "alpha_bar":
        before, after = _alpha_bars(scheduler, step)
        return (before**0.5, (1 - before) ** 0.5), (after**0.5, (1 - after) ** 0.5)
    s0, s1 = float(scheduler.sigmas[step]), float(scheduler.sigmas[step + 1])
    return ((1 - s0, s0), (1 - s1, s1)) if kind == "flow" else ((1.0, s0), (1.0, s1))


def _alpha_bars(scheduler: Any, step: int) -> tuple[float, float]:
    time = int(scheduler.timesteps[step])
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    table = scheduler.alphas_cumprod
    last = time - stride < 0
    return float(table[time]), float(scheduler.final_alpha_cumprod if last else table[time - stride])
