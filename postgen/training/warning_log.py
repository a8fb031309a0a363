"""The warnings of a run, kept beside its metrics: a terminal that is closed takes its own with it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from postgen.errors import cut_words

NAME = "warnings.jsonl"
"""One JSON object a line: `time` (UTC), `step`, `kind`, `text`. A run that goes on appends to it."""
_MOST = 1000
"""Lines that one call of `train` adds: what warns at every step shall not fill a disk."""


@contextmanager
def kept_warnings(folder: Path, step: Callable[[], int], *, main: bool) -> Iterator[None]:
    """Inside, each warning that is shown is also written to `warnings.jsonl` in a run's folder.

    Args:
        folder: of the run.
        step: returns the step that the run is at.
        main: whether this is the process that writes; the others only show theirs.
    """
    if not main:
        yield
        return
    shown, left = warnings.showwarning, _MOST

    def keep(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        nonlocal left
        shown(message, category, filename, lineno, file, line)
        if left > 0:
            left -= 1
            _append(folder / NAME, {"step": step(), "kind": category.__name__, "text": cut_words(str(message), 200)})

    # Assigned, and not by catch_warnings: that would also show again what was shown before.
    warnings.showwarning = keep
    try:
        yield
    finally:
        if warnings.showwarning is keep:
            warnings.showwarning = shown


def _append(path: Path, row: dict[str, Any]) -> None:
    with suppress(OSError), path.open("a", encoding="utf-8") as file:  # a full disk is told of by what must be written
        file.write(json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **row}) + "\n")
