"""What is said and done about the checkpoint that a run goes on from, and about those from which it cannot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from postgen.errors import UserError, cut, first_line

from .checkpoint_head import DamagedCheckpoint, read_head
from .config import TrainingConfig
from .logging import say
from .recipe import METHODS
from .updates import UpdatesConfig

_UNSAID = {"output_dir", "resume_from_checkpoint", "allow_changed", "evaluate_only", "dry_run", "disable_tqdm"}
"""Settings of a call and not of a run: nothing is said of them."""
_SHOWN = 100
"""Characters of a value in a message."""


def put_aside(damaged: Mapping[Path, str]) -> None:
    """Rename checkpoints so that they pass for none any more, and say so.

    Args:
        damaged: what is wrong with each.
    """
    for folder, problem in damaged.items():
        number = 0
        while (place := folder.with_name(f"{folder.name}.damaged{number or ''}")).exists():
            number += 1
        folder.rename(place)
        say(f"postgen: warning: {problem}; it is kept as {place.name}, and an earlier checkpoint is taken.")


def none_is_sound(damaged: Mapping[Path, str]) -> str:
    """Return what is said where all checkpoints are damaged, the newest named first."""
    newest, *others = damaged.values()
    more = f" (and {len(others)} before it)" if others else ""
    return (
        f"{newest}{more}. Name a sound checkpoint with resume_from_checkpoint, take weights with init_from, or begin"
        " anew in another output_dir."
    )


def check_first(folders: Sequence[Path], config: TrainingConfig) -> None:
    """Check the settings of the first of these checkpoints that says what it is, before a model is loaded.

    Raises:
        UserError: as `check_settings` does.
    """
    for folder in folders:
        # A damaged one is told of, and put aside, where its tensors are read.
        with suppress(DamagedCheckpoint):
            check_settings(folder, read_head(folder).meta["config"], config)
            return


def check_settings(folder: Path, before: Mapping[str, Any], config: TrainingConfig) -> dict[str, str]:
    """Compare the settings that a checkpoint was made with with those of a run that goes on from it.

    Args:
        folder: the checkpoint.
        before: its settings.
        config: those of the run. Where it only evaluates, and for what it names in `allow_changed`, any may differ.

    Returns:
        `old -> new` by name, for those that differ.

    Raises:
        UserError: another method, or a setting differs that changes what is learned.
    """
    _check_method(folder, before.get("method"), config.method)
    changed = changed_settings(before, config)
    may = free_to_change(config) | {*config.allow_changed}
    refused = [
        name for name in changed if name not in may and not name.startswith("eval_") and not config.evaluate_only
    ]
    if refused:
        told = ", ".join(f"{name}: {changed[name]}" for name in refused)
        raise UserError(
            f"{folder} was made with other settings: {told}. With these it would be another run: give the old values,"
            f" or allow the new ones with --allow_changed {' '.join(refused)}"
        )
    return changed


def announce(folder: Path, step: int, changed: Mapping[str, str], config: TrainingConfig) -> None:
    """Say where a run goes on, under which other settings, and whether anything is left to do.

    Args:
        folder: the checkpoint.
        step: optimiser steps done.
        changed: what `check_settings` returns.
        config: of the run.
    """
    told = [f"{name}: {values}" for name, values in changed.items()]
    if "max_steps" in changed and config.lr_scheduler_type in ("linear", "cosine"):
        told.append(f"the learning rate is from here on that of a {config.lr_scheduler_type} run of the new length")
    say(f"resumed from {folder}" + (f"; changed since: {', '.join(told)}" if told else ""))
    if step >= config.max_steps and not config.evaluate_only:
        say(
            f"it is at step {step}: nothing is left to do up to max_steps {config.max_steps}, raise max_steps to"
            " train on"
        )


def free_to_change(config: UpdatesConfig) -> set[str]:
    """Return the settings that change nothing of what is learned, by the parts of a configuration."""
    return {name for base in type(config).__mro__ for name in vars(base).get("may_change", ())}


def changed_settings(before: Mapping[str, Any], config: UpdatesConfig) -> dict[str, str]:
    """Return `old -> new` by name of the settings that are not as before; of those of a call nothing is said."""
    now = json.loads(json.dumps(config.to_dict(), default=str))  # as a checkpoint keeps them
    fresh = {
        item.name: item.default_factory() if callable(item.default_factory) else item.default
        for item in dataclasses.fields(config)
    }
    changed = {}
    for name, value in now.items():
        # A version of before the setting had what is its default now.
        old = before.get(name, fresh[name])
        if name not in _UNSAID and old != value:
            changed[name] = f"{cut(str(old), _SHOWN)} -> {cut(str(value), _SHOWN)}"
    return changed


def _check_method(folder: Path, before: Any, now: str) -> None:
    """Compare the methods; of those that are not ours nothing is known."""
    if before != now and isinstance(before, str) and {before, now} <= METHODS.keys():
        raise UserError(
            f"{folder} was written by method {before}, this run is {now}: take its weights alone with init_from, or"
            " resume it with its own recipe."
        )


def not_of(folder: Path, rank: int, trainer: str, error: Exception) -> DamagedCheckpoint:
    """Return what is raised where a trainer cannot take back the state of a process."""
    return DamagedCheckpoint(
        f"{folder} is damaged: rank-{rank} does not hold what {trainer} keeps there ({type(error).__name__}:"
        f" {first_line(error)})"
    )
