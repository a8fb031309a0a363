"""Files of a data set that cannot be used, collected so that one message names them all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from postgen.errors import UserError, cut
from postgen.files import replacing

_SHOWN = 3
"""Number of files that a message describes."""
_LONGEST = 240
"""Largest number of characters of one reason in a message."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A file or row that cannot be used."""

    key: str
    """Name of the file or row."""
    reason: str
    """What is wrong, and what to do."""


def check_faults(faults: list[Fault], total: int, where: str) -> None:
    """Raise one error about all files that cannot be used.

    Args:
        faults: the files with their reasons; without any the function does nothing.
        total: number of files and rows in the data set.
        where: name of the data set.

    Raises:
        UserError: there is a file that cannot be used.
    """
    if not faults:
        return
    told = [cut(" ".join(f"{fault.key}: {fault.reason}".split()), _LONGEST) for fault in faults[:_SHOWN]]
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    raise UserError(
        f"{where}: {len(faults)} of {total} files or rows cannot be used: {'; '.join(told)}{more}. Correct or remove"
        " them, or continue without them by skip_bad: true"
    )


def write_faults(path: Path, faults: list[Fault]) -> None:
    """Write the files that are left out to a JSONL file, with `key` and `reason`; without any, remove the file."""
    if not faults:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps({"key": fault.key, "reason": fault.reason}) + "\n" for fault in faults]
    with replacing(path) as part:
        part.write_text("".join(lines), encoding="utf-8")
