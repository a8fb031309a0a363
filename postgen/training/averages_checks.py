"""Checks, as early as possible, that a run can average its checkpoints if a setting asks for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from postgen.errors import UserError, did_you_mean

from . import checkpoint
from .checkpoint_head import NAME
from .config import TrainingConfig

_INEXACT = ("lora_magnitude_vector", "lora_embedding_", ".aux_up")
"""Parts of the names of adapters whose average is not that of their effect: DoRA, adapters of embeddings, and branches
of quantised layers, which have a gain for each component."""


def check_count(args: TrainingConfig, resumed: Sequence[Path] = (), *, more: bool = False) -> None:
    """Check, before a model is loaded, that a run writes the checkpoints that its averages need.

    A run with `save_seconds` or callbacks is not checked, because the number of its checkpoints is unknown.

    Args:
        args: the configuration.
        resumed: the checkpoints that the run may resume, the newest first.
        more: whether the run has callbacks, which may save checkpoints.

    Raises:
        UserError: `merge_last` would have fewer than two checkpoints, or `rescue_spike` none before the last step.
    """
    if more or args.evaluate_only or args.save_seconds or not args.save_steps:
        return
    before = {_step(path) for path in checkpoint.named(args.folder)}
    begin = max((_step(path) for path in resumed), default=0)
    # The end of a run writes a checkpoint.
    new = {*range(begin - begin % args.save_steps + args.save_steps, args.max_steps, args.save_steps)}
    new |= {args.max_steps} if begin < args.max_steps else set()
    every = f"save_steps {args.save_steps} and max_steps {args.max_steps}"
    if args.merge_last and len(before | new) < 2:
        raise UserError(
            f"merge_last {args.merge_last} needs two checkpoints or more, but {every} give one, at the end of the run:"
            f" {_remedy(args, 'merge_last')}"
        )
    if args.rescue_spike and not before and len(new) < 2:
        raise UserError(
            f"rescue_spike goes back to earlier checkpoints, but {every} give none before the last step:"
            f" {_remedy(args, 'rescue_spike')}"
        )


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def _remedy(args: TrainingConfig, name: str) -> str:
    more = "train more steps" if args.max_steps < 2 else "set save_steps below max_steps"
    return f"{more}, or leave {name} out"


def check_adapters(args: TrainingConfig, trained: Iterable[str]) -> None:
    """Check, at the start of a run, that its trained parameters can be averaged if a setting asks for it.

    Args:
        args: the configuration.
        trained: names of the trained parameters.

    Raises:
        UserError: the adapters are DoRA, or adapt embeddings.
    """
    setting = "merge_last" if args.merge_last else "rescue_spike" if args.rescue_spike else ""
    if setting and (bad := next((name for name in trained if any(part in name for part in _INEXACT)), "")):
        raise UserError(
            f"{setting} averages checkpoints, but {bad} is part of an adapter (DoRA, of an embedding, or a branch of a"
            f" quantised layer) whose effect cannot be averaged: leave {setting} out, or train a plain LoRA"
        )


def asks_anew(args: TrainingConfig, step: int, changed: Collection[str]) -> bool:
    """Return whether a resumed run must check `merge_metric` again before it goes on.

    Args:
        args: the configuration.
        step: optimiser steps done.
        changed: names of the settings that differ from those of the checkpoint.
    """
    anew = any(name.startswith(("merge_", "eval_")) for name in changed)
    return bool(args.merge_metric) and anew and step < args.max_steps


def check_metric(args: TrainingConfig, values: Mapping[str, float], remedy: str = "") -> None:
    """Check that an evaluation has the metric that decides about the merge, if there is one.

    Args:
        args: the configuration.
        values: metrics of the evaluation.
        remedy: what the user can do; by default for the start of a run.

    Raises:
        UserError: it has not.
    """
    if not args.merge_metric or metric_name(args) in values:
        return
    known = f"it has {', '.join(values)}" if values else "this run has no evaluation: give held-out data"
    near = did_you_mean(metric_name(args), values)
    remedy = remedy or "Correct merge_metric, or leave it out with merge_keep: always."
    raise UserError(f"merge_metric is {args.merge_metric!r}, which the evaluation lacks ({known}).{near} {remedy}")


def metric_name(args: TrainingConfig) -> str:
    """Return the name of `merge_metric` in the metrics of an evaluation."""
    return f"eval_{args.merge_metric.removeprefix('eval_')}"
