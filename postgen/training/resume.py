"""Resuming: comparison of settings, damaged checkpoints, and the messages about them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from postgen.errors import UserError, cut, first_line

from .checkpoint_head import DamagedCheckpoint, read_head
from .config import TrainingConfig
from .logging import Sums, say
from .recipe import METHODS
from .updates import UpdatesConfig

_UNSAID = {"output_dir", "resume_from_checkpoint", "allow_changed", "evaluate_only", "dry_run", "disable_tqdm"}
"""Settings that belong to a call and not to a run: messages about changed settings leave them out."""
_SHOWN = 100
"""Maximum number of characters of a value in a message."""


def put_aside(damaged: Mapping[Path, str]) -> None:
    """Rename damaged checkpoints to `checkpoint-N.damaged`, so that they are not found again, and warn.

    Args:
        damaged: folder -> description of the damage.
    """
    for folder, problem in damaged.items():
        number = 0
        while (place := folder.with_name(f"{folder.name}.damaged{number or ''}")).exists():
            number += 1
        folder.rename(place)
        say(f"postgen: warning: {problem}; it is renamed to {place.name}, and the run resumes an earlier checkpoint.")


def none_is_sound(damaged: Mapping[Path, str]) -> str:
    """Return the message for the case that all checkpoints are damaged.

    Args:
        damaged: folder -> description of the damage, newest first.
    """
    newest, *others = damaged.values()
    more = f" (and {len(others)} before it)" if others else ""
    return (
        f"{newest}{more}. Give an intact checkpoint as resume_from_checkpoint, load weights with init_from, or start a"
        " new run in another output_dir."
    )


def check_first(folders: Sequence[Path], config: TrainingConfig, processes: int) -> None:
    """Check the settings of the first readable checkpoint, before a model is loaded.

    Args:
        folders: the checkpoints, in the order in which to try them.
        config: configuration of this run.
        processes: number of processes of this run.

    Raises:
        UserError: `check_settings` refuses the settings.
    """
    for folder in folders:
        # Damaged checkpoints are skipped here. `Trainer._resume` reports and renames them.
        with suppress(DamagedCheckpoint):
            head = read_head(folder)
            check_settings(folder, head.meta["config"], config, shared_anew=head.ranks != processes)
            return


def check_settings(
    folder: Path, before: Mapping[str, Any], config: TrainingConfig, *, shared_anew: bool = False
) -> dict[str, str]:
    """Compare the settings of a checkpoint with those of the run that resumes it.

    Args:
        folder: the checkpoint.
        before: settings of the run that wrote the checkpoint.
        config: configuration of this run. Settings in its `allow_changed` may differ; with `evaluate_only`, all may.
        shared_anew: whether this run has another number of processes. The settings that divide a batch over processes
            (`Part.share_out`) may then differ; `state_of_others` checks that the batch as a whole is the same.

    Returns:
        Setting name -> "old -> new", for each setting that differs.

    Raises:
        UserError: the methods differ, or a setting that changes what is learned differs.
    """
    _check_method(folder, before.get("method"), config.method)
    changed = changed_settings(before, config)
    may = config.named_in("may_change") | {*config.allow_changed}
    if shared_anew:
        may |= config.named_in("share_out")
    refused = [
        name for name in changed if name not in may and not name.startswith("eval_") and not config.evaluate_only
    ]
    if refused:
        listed = ", ".join(f"{name}: {changed[name]}" for name in refused)
        raise UserError(
            f"{folder} was written with other settings: {listed}. These settings change what is learned: use the old"
            f" values, or allow the new ones with --allow_changed {' '.join(refused)}"
        )
    return changed


def announce(folder: Path, step: int, changed: Mapping[str, str], config: TrainingConfig) -> None:
    """Print the checkpoint that a run resumes, the changed settings, and a note if the run is already complete.

    Args:
        folder: the checkpoint.
        step: optimiser steps done.
        changed: return value of `check_settings`.
        config: configuration of this run.
    """
    listed = [f"{name}: {values}" for name, values in changed.items()]
    if "max_steps" in changed and config.lr_scheduler_type in ("linear", "cosine"):
        listed.append(f"the learning rate now follows the {config.lr_scheduler_type} schedule of the new length")
    say(f"resumed from {folder}" + (f"; changed settings: {', '.join(listed)}" if listed else ""))
    if step >= config.max_steps and not config.evaluate_only:
        say(
            f"the checkpoint is at step {step} and max_steps is {config.max_steps}: nothing is left to train, raise"
            " max_steps to continue"
        )


def on_host(value: Any) -> Any:
    """Return a copy of a tensor on the CPU; return any other value unchanged."""
    return value.cpu() if isinstance(value, Tensor) else value


def section(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries whose names start with a prefix, with the prefix removed from the names."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def averages_in(ranks: Sequence[Mapping[str, Any]], rank: int, processes: int) -> Sums:
    """Return the metric averages in progress with which a process resumes.

    With the same number of processes, each gets its own averages. Otherwise rank 0 gets the sum of all, and the other
    ranks get none. The next mean is then weighted by the old number of processes for metrics that each process adds
    once per step, such as the gradient norm.

    Args:
        ranks: state of each process of the checkpoint.
        rank: rank of this process.
        processes: number of processes of this run.
    """
    if len(ranks) == processes:
        own: Sums = ranks[rank]["averages"]
        return own
    added: Sums = {"sums": {}, "counts": {}}
    for part in [each["averages"] for each in ranks] if rank == 0 else ():
        for name, value in part["sums"].items():
            added["sums"][name] = added["sums"].get(name, 0.0) + value
            added["counts"][name] = added["counts"].get(name, 0) + part["counts"][name]
    return added


def changed_settings(before: Mapping[str, Any], config: UpdatesConfig) -> dict[str, str]:
    """Return setting name -> "old -> new" for each setting that differs; settings of a call are left out."""
    now = json.loads(json.dumps(config.to_dict(), default=str))  # the form that checkpoints store
    fresh = {
        item.name: item.default_factory() if callable(item.default_factory) else item.default
        for item in dataclasses.fields(config)
    }
    changed = {}
    for name, value in now.items():
        # If the checkpoint's version did not have a setting yet, it behaved like the setting's default.
        old = before.get(name, fresh[name])
        if name not in _UNSAID and old != value:
            changed[name] = f"{cut(str(old), _SHOWN)} -> {cut(str(value), _SHOWN)}"
    return changed


def _check_method(folder: Path, before: Any, now: str) -> None:
    """Check that two methods of `METHODS` are equal. Methods outside `METHODS` are not checked."""
    if before != now and isinstance(before, str) and {before, now} <= METHODS.keys():
        raise UserError(
            f"{folder} was written by method {before}, but this run has method {now}: load its weights only with"
            " init_from, or resume it with its own recipe."
        )


def not_of(folder: Path, rank: int, trainer: str, error: Exception) -> DamagedCheckpoint:
    """Return the exception for the case that a trainer cannot restore the state of a process."""
    return DamagedCheckpoint(
        f"{folder} is damaged: rank-{rank} does not hold the state of {trainer} ({type(error).__name__}:"
        f" {first_line(error)})"
    )
