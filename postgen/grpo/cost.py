"""Estimate of the cost of a run before it starts: memory and passes through the denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from postgen.training.processes import counted

from .batches import Batches


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a method computes and keeps for one sample. A pass is one row through the denoiser; guidance doubles it."""

    rollout: float
    """Forward passes of the rollout of one sample."""
    trained: float
    """Passes with gradients for one sample in one iteration."""
    beside: float
    """Forward passes without gradients (old policy, reference) for each pass with gradients."""
    latents: int
    """Number of latents kept for each sample of a rollout."""
    data: float = 0.0
    """Passes with gradients on clips (`data_beta`) for one sample in one iteration."""
    once: float = 0.0
    """Forward passes before the first update, of all processes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The quantities of a run that determine its cost."""

    batches: Batches
    """Sizes of rollouts, updates and micro-batches."""
    work: Work
    """Passes and latents per sample."""
    weights: int
    """Bytes of the pipeline's weights."""
    trained: int
    """Number of trained parameters."""
    latent: int
    """Number of values in the latents of one sample."""
    clip: int
    """Number of values in one clip."""
    backward: float
    """Cost of a backward pass in forward passes, see `Meter`."""
    max_steps: int
    """Updates (optimiser steps) of the run."""


def estimate(plan: Plan) -> dict[str, float]:
    """Return the estimated cost of a run by name: bytes of one process, and forward-equivalents of all processes.

    A forward-equivalent is the cost of one forward pass. `postgen.training.memory` estimates the memory of a step.
    """
    batches, work = plan.batches, plan.work
    here = batches.samples // batches.processes
    per_rollout = batches.samples * work.rollout + batches.samples * batches.kept / batches.group * (
        batches.iterations * (work.trained * (1 + plan.backward + work.beside) + work.data * (1 + plan.backward))
    )
    updates = batches.updates * batches.iterations
    return {
        "bytes/weights": float(plan.weights),
        "bytes/rollout": float(here * plan.latent * 4 * work.latents),
        "bytes/clips": float(here * plan.clip * 4),
        "trained_parameters": float(plan.trained),
        "passes/rollout_per_sample": work.rollout,
        "passes/train_per_sample": work.trained,
        "forward_equivalents/update": per_rollout / updates,
        "forward_equivalents/run": per_rollout / updates * plan.max_steps + work.once,
    }


def report(plan: Plan, numbers: Mapping[str, float]) -> str:
    """Return the lines that a dry run prints."""
    batches, giga = plan.batches, 2**30
    updates = batches.updates * batches.iterations
    lines = [
        f"{counted(batches.processes)}, {batches.prompts} prompt{'s' * (batches.prompts != 1)} x {batches.group}"
        f" samples per rollout, {updates} update{'s' * (updates != 1)} per rollout, {plan.max_steps} in total",
        *(
            f"{name:28s} {value / giga:10.3f} GiB" if name.startswith("bytes") else f"{name:28s} {value:10.4g}"
            for name, value in numbers.items()
        ),
        "not counted: activations of text encoder and autoencoder, workspaces of kernels, the networks of rewards",
    ]
    if torch.cuda.is_available():
        lines.append(f"{'free GPU memory':28s} {torch.cuda.mem_get_info()[0] / giga:10.3f} GiB")
    return "\n".join(lines)
