"""What is said and done about checkpoints that a run cannot go on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postgen.errors import UserError, first_line

from .checkpoint_head import DamagedCheckpoint
from .logging import say
from .recipe import METHODS


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


def check_method(folder: Path, before: Any, now: str) -> None:
    """Compare the method that wrote a checkpoint with that of this run; of methods that are not ours nothing is known.

    Raises:
        UserError: they differ.
    """
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
