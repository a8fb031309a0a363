"""What is said and done about the checkpoint that a run goes on from, and about those from which it cannot."""

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


def check_first(folders: Sequence[Path], config: TrainingConfig, processes: int) -> None:
    """Check the settings of the first of these checkpoints that says what it is, before a model is loaded.

    Args:
        folders: the checkpoints.
        config: of the run.
        processes: that train it.

    Raises:
        UserError: as `check_settings` does.
    """
    for folder in folders:
        # A damaged one is told of, and put aside, where its tensors are read.
        with suppress(DamagedCheckpoint):
            head = read_head(folder)
            check_settings(folder, head.meta["config"], config, shared_anew=head.ranks != processes)
            return


def check_settings(
    folder: Path, before: Mapping[str, Any], config: TrainingConfig, *, shared_anew: bool = False
) -> dict[str, str]:
    """Compare the settings that a checkpoint was made with with those of a run that goes on from it.

    Args:
        folder: the checkpoint.
        before: its settings.
        config: those of the run. Where it only evaluates, and for what it names in `allow_changed`, any may differ.
        shared_anew: whether another number of processes goes on, so that those may differ that share a batch out; that
            it is the same batch, `state_of_others` checks.

    Returns:
        `old -> new` by name, for those that differ.

    Raises:
        UserError: another method, or a setting differs that changes what is learned.
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


def on_host(value: Any) -> Any:
    """Return a tensor on the CPU, and anything else as it is."""
    return value.cpu() if isinstance(value, Tensor) else value


def section(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return what has names that begin so, without that beginning."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def averages_in(ranks: Sequence[Mapping[str, Any]], rank: int, processes: int) -> Sums:
    """Return the averages in progress of a process: its own, or, of another number of processes, the first one's all.

    What each process adds once a step, as the norm of gradients, weighs in the next mean by how many there were.

    Args:
        ranks: what each process of the checkpoint kept.
        rank: of this process.
        processes: of this run.
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
