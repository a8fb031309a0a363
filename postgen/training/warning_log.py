"""The warnings of a run, written to a file in its folder, so that they survive the terminal."""

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
"""Name of the file. Each line is a JSON object with `time` (UTC), `step`, `kind`, `text`. A resumed run appends."""
_MOST = 1000
"""Maximum number of lines per call of `train`, so that a warning at every step does not fill the disk."""


@contextmanager
def kept_warnings(folder: Path, step: Callable[[], int], *, main: bool) -> Iterator[None]:
    """Write each warning that the enclosed code shows also to `warnings.jsonl` in a run's folder.

    Args:
        folder: folder of the run.
        step: returns the current step.
        main: whether this process writes the file; other processes only show their warnings.
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

    # Assigned directly, because `warnings.catch_warnings` would also reset which warnings were already shown.
    warnings.showwarning = keep
    try:
        yield
    finally:
        if warnings.showwarning is keep:
            warnings.showwarning = shown


def _append(path: Path, row: dict[str, Any]) -> None:
    # A full disk is ignored here; the next checkpoint reports it.
    with suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **row}) + "\n")
