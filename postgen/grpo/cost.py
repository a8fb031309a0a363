"""What a run would cost, before it is started: memory and passes through the denoiser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from postgen.training import Reason, TrainResult

from .config import DanceGRPOConfig

if TYPE_CHECKING:
    from .group import GroupTrainer


def report(trainer: GroupTrainer[Any]) -> TrainResult:
    """Load the model, print the estimate, and return without training."""
    trainer.build()
    numbers = estimate(trainer)
    if trainer.accelerator.is_main_process:
        print("\n".join(_lines(trainer, numbers)))
    return TrainResult(global_step=0, reason=Reason.DONE, metrics=numbers)


def estimate(trainer: GroupTrainer[Any]) -> dict[str, float]:
    """Return bytes (of one process) and forward-equivalents (of all), names as in the report.

    Activations are not estimated: they depend on the model's code and on checkpointing.
    """
    args, batches, policy = trainer.args, trainer.batches, trainer.policy
    trained = [p for module in policy.modules.values() for p in module.parameters() if p.requires_grad]
    latent = trainer.sampler.noise([0]).numel() * 4
    rollout, train = passes(trainer)
    frames, height, width = (trainer.size[name] for name in ("num_frames", "height", "width"))
    here = batches.samples // batches.processes
    forward_process = not isinstance(args, DanceGRPOConfig)
    stored = 1 if forward_process else trainer.sampler.how.window + 2
    means = trainer.sampler.how.window if trainer.sampler.how.keep_means else 0
    backward = trainer.meter.backward
    beside = int(forward_process) + int(args.beta > 0)  # passes of the old and of the reference policy
    per_rollout = batches.samples * rollout + batches.samples * batches.kept / batches.group * (
        batches.iterations * train * (1 + backward + beside)
    )
    updates = batches.updates * batches.iterations
    copies = int(forward_process) + int(policy.copies_reference)
    return {
        "bytes/weights": float(_bytes(_parameters(policy.pipe.components.values()))),
        # Gradient, two moments of AdamW, the average, and what stands in for other policies, all float32.
        "bytes/training": float(sum(p.numel() for p in trained) * 4 * (3 + int(args.ema_decay > 0) + copies)),
        "bytes/rollout": float(here * latent * (stored + means)),
        "bytes/clips": float(here * frames * 3 * height * width * 4),
        "trained_parameters": float(sum(p.numel() for p in trained)),
        "passes/rollout_per_sample": rollout,
        "passes/train_per_sample": train,
        "forward_equivalents/update": per_rollout / updates,
        "forward_equivalents/run": per_rollout / updates * args.max_steps,
    }


def passes(trainer: GroupTrainer[Any]) -> tuple[float, float]:
    """Return forward passes of a sample's rollout, and passes with gradients in one iteration over it."""
    from postgen.sampling.solver import coarser

    from .trainer import DanceGRPOTrainer

    sampler, args = trainer.sampler, trainer.args
    steps = sampler.schedule.steps
    if not isinstance(trainer, DanceGRPOTrainer):
        return sampler.passes * float(len(coarser(0, steps, sampler.how.fraction)) - 1), sampler.passes * float(
            getattr(args, "train_timesteps", 1)
        )
    window = trainer.window
    middle = (window.first + window.stop - window.size) // 2
    shared = args.share_initial_noise and args.sde_window_per != "sample"
    prefix = middle / args.num_generations if shared else middle
    tail = len(coarser(middle + window.size, steps, sampler.how.fraction)) - 1
    return sampler.passes * float(prefix + window.size + tail), sampler.passes * float(window.kept)


def _lines(trainer: GroupTrainer[Any], numbers: dict[str, float]) -> list[str]:
    batches, giga = trainer.batches, 2**30
    lines = [
        f"{batches.processes} process(es), {batches.prompts} prompts x {batches.group} samples a rollout, "
        f"{batches.updates * batches.iterations} update(s) each, {trainer.args.max_steps} updates",
        *(
            f"{name:28s} {value / giga:10.3f} GiB" if name.startswith("bytes") else f"{name:28s} {value:10.4g}"
            for name, value in numbers.items()
        ),
        "not counted: activations, caches of kernels, rewards with networks of their own",
    ]
    if torch.cuda.is_available():
        lines.append(f"{'free GPU memory':28s} {torch.cuda.mem_get_info()[0] / giga:10.3f} GiB")
    return lines


def _parameters(components: Iterable[Any]) -> Iterable[nn.Parameter]:
    for component in components:
        if isinstance(component, nn.Module):
            yield from component.parameters()


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
