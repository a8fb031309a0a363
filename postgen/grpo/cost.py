"""What a run would cost, before it is started: memory and passes through the denoiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .batches import Batches


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a method does with one sample; passes are rows through the denoiser, those of guidance counted."""

    rollout: float
    """Forward passes of its rollout."""
    trained: float
    """Passes with gradients in one iteration over it."""
    beside: int
    """Forward passes of other policies, the old one or the reference, for each of those."""
    latents: int
    """Latents that are kept of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run as far as its cost goes."""

    batches: Batches
    work: Work
    weights: int
    """Bytes of the pipeline's weights."""
    trained: int
    """Trained parameters."""
    copies: int
    """Copies of the trained parameters: their average, and what stands in for other policies."""
    latent: int
    """Numbers in the latents of a sample."""
    clip: int
    """Numbers in a clip."""
    backward: float
    """Forward passes that a backward pass costs, see `Meter`."""
    max_steps: int
    """Updates."""


def estimate(plan: Plan) -> dict[str, float]:
    """Return bytes (of one process) and forward-equivalents (of all), names as in the report.

    Activations are not estimated: they depend on the model's code and on checkpointing.
    """
    batches, work = plan.batches, plan.work
    here = batches.samples // batches.processes
    per_rollout = batches.samples * work.rollout + batches.samples * batches.kept / batches.group * (
        batches.iterations * work.trained * (1 + plan.backward + work.beside)
    )
    updates = batches.updates * batches.iterations
    return {
        "bytes/weights": float(plan.weights),
        # Gradient, two moments of AdamW, and the copies, all float32.
        "bytes/training": float(plan.trained * 4 * (3 + plan.copies)),
        "bytes/rollout": float(here * plan.latent * 4 * work.latents),
        "bytes/clips": float(here * plan.clip * 4),
        "trained_parameters": float(plan.trained),
        "passes/rollout_per_sample": work.rollout,
        "passes/train_per_sample": work.trained,
        "forward_equivalents/update": per_rollout / updates,
        "forward_equivalents/run": per_rollout / updates * plan.max_steps,
    }


def report(plan: Plan, numbers: Mapping[str, float]) -> str:
    """Return the lines that a dry run prints."""
    batches, giga = plan.batches, 2**30
    lines = [
        f"{batches.processes} process(es), {batches.prompts} prompts x {batches.group} samples a rollout, "
        f"{batches.updates * batches.iterations} update(s) each, {plan.max_steps} updates",
        *(
            f"{name:28s} {value / giga:10.3f} GiB" if name.startswith("bytes") else f"{name:28s} {value:10.4g}"
            for name, value in numbers.items()
        ),
        "not counted: activations, caches of kernels, rewards with networks of their own",
    ]
    if torch.cuda.is_available():
        lines.append(f"{'free GPU memory':28s} {torch.cuda.mem_get_info()[0] / giga:10.3f} GiB")
    return "\n".join(lines)


def bytes_of(components: Iterable[Any]) -> int:
    """Return the bytes of the parameters of those components that are modules."""
    modules = [component for component in components if isinstance(component, nn.Module)]
    return sum(parameter.numel() * parameter.element_size() for part in modules for parameter in part.parameters())


def trained_in(modules: Iterable[nn.Module]) -> int:
    """Return how many parameters of some modules are trained."""
    return sum(parameter.numel() for part in modules for parameter in part.parameters() if parameter.requires_grad)
