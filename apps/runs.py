"""Training runs for the page: the server finds them and reads new lines as they are written, only in their folder."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from postgen.errors import UserError, is_number
from postgen.reading import parse_json, read_text
from postgen.training.checkpoint_head import read_head
from postgen.training.run_curves import Curves
from postgen.training.warning_log import NAME as WARNINGS

METRICS, CONFIG = "metrics.jsonl", "config.yaml"
"""File names of metrics and configuration; a folder with at least one of them is a run."""
_DEEPEST, _MOST = 3, 500
"""Depth of the search for runs, in folder levels, and largest number of listed runs per folder."""
_KEPT = 16
"""Number of runs whose curves stay in memory."""
_SETTINGS_BYTES, _TAIL_BYTES = 2**18, 2**16
"""Largest configuration that is read, and length of the part that is read at the end of the warnings, in bytes."""
_SAMPLE = re.compile(r"step-(\d{1,12})\.png")
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
_INSIDE = ("samples", "completions", "export")
"""Subfolders of a run that are never runs themselves."""
_QUIET, _STEPS = 120.0, 20
"""A run counts as stopped if it writes no line for this many seconds and for the time of this many steps."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Samples with fixed seeds from one evaluation."""

    step: int
    sheet: Path
    """Picture with one row of frames per clip."""
    video: Path | None
    """Video of the clips side by side; None if the samples are pictures or ffmpeg was missing."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in a run's folder."""

    step: int
    bytes: int
    sound: bool
    """Whether all files exist and have the recorded sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """Progress of a run."""

    step: int
    total: int
    """Total number of steps; 0 if the configuration has no `max_steps`."""
    step_time: float | None
    """Seconds per step, from the last metrics."""
    age: float | None
    """Seconds since the last metrics were written; None if there are none."""

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return bool(self.total) and self.step >= self.total

    @property
    def writes(self) -> bool:
        """Whether the run seems to be active: not done, and new metrics are not overdue."""
        quiet = max(_QUIET, _STEPS * (self.step_time or 0.0))
        return not self.done and self.age is not None and self.age < quiet

    @property
    def seconds_left(self) -> float | None:
        """Estimated remaining seconds of an active run; None if unknown."""
        if not self.writes or not self.total or not self.step_time:
            return None
        return max(0.0, (self.total - self.step) * self.step_time - (self.age or 0.0))


class Run:
    """One training run. Its metrics are read incrementally: each call reads new lines only.

    Args:
        name: name of the run on the page.
        folder: folder of the run.
        root: folder of all runs; files outside of it are never read.
    """

    def __init__(self, name: str, folder: Path, root: Path) -> None:
        self.name, self.folder, self._root = name, folder, root
        self._curves = Curves(folder / METRICS, wanted=lambda metric: True)
        self._lock = threading.Lock()

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Read new lines and return the points (step, value) of each metric; the curves of long runs are thinned."""
        with self._lock:
            self._read_on()
            return self._curves.points()

    def newest(self) -> dict[str, float | None]:
        """Read new lines and return the last value of each metric; None stands for NaN or infinity."""
        with self._lock:
            self._read_on()
            return dict(self._curves.newest)

    def standing(self) -> Standing:
        """Return the progress of the run."""
        newest, total = self.newest(), self.settings().get("max_steps")
        step_time, age = newest.get("step_time"), None
        if (path := self.file(METRICS)) is not None:
            with suppress(OSError):
                age = max(0.0, time.time() - path.stat().st_mtime)
        whole = isinstance(total, int) and not isinstance(total, bool) and total > 0
        return Standing(
            step=self._curves.step,
            total=int(total) if whole and total is not None else 0,
            step_time=step_time if is_number(step_time) and step_time else None,
            age=age if self._curves.newest else None,
        )

    def settings(self) -> Mapping[str, Any]:
        """Return the configuration of the run; an empty mapping if it is missing or invalid."""
        with suppress(UserError, yaml.YAMLError, RecursionError):
            found = yaml.safe_load(self._config_text())
            return found if isinstance(found, dict) else {}
        return {}

    def recipe(self) -> str:
        """Return the configuration as YAML, with absolute paths replaced by file names."""
        return yaml.safe_dump(_without_places(dict(self.settings())), sort_keys=False, allow_unicode=True, width=100)

    def samples(self) -> list[Sample]:
        """Return the samples with fixed seeds, ordered by step."""
        found = []
        for path in self._inside("samples"):
            match = _SAMPLE.fullmatch(path.name)
            if match is not None and self.file(f"samples/{path.name}") is not None:
                video = self.file(f"samples/{path.with_suffix('.mp4').name}")
                found.append(Sample(int(match[1]), path, video))
        return sorted(found, key=lambda sample: sample.step)

    def warnings(self, most: int = 20) -> list[dict[str, Any]]:
        """Return the last warnings, newest first.

        Args:
            most: largest number of warnings.

        Returns:
            For each warning `step`, `text`, `time`, and `times`: how often it was repeated in a row.
        """
        rows: deque[dict[str, Any]] = deque(maxlen=most)
        for line in self._tail(WARNINGS):
            with suppress(UserError):
                row = parse_json(line, "a line")
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    continue
                if rows and rows[-1]["text"] == row["text"]:
                    rows[-1] = {**row, "times": rows[-1]["times"] + 1}
                else:
                    rows.append({**row, "times": 1})
        return list(reversed(rows))

    def checkpoints(self) -> list[Checkpoint]:
        """Return the checkpoints, newest first."""
        found = []
        for path in self._inside(""):
            match = _CHECKPOINT.fullmatch(path.name)
            if match is None or not self._safe(path) or not path.is_dir():
                continue
            size = 0
            with suppress(OSError):
                size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
            found.append(Checkpoint(int(match[1]), size, _is_sound(path)))
        return sorted(found, key=lambda one: one.step, reverse=True)

    def mark(self) -> str:
        """Return a text that changes whenever the run has new data to show."""
        names = [path.name for path in (*self._inside("samples"), *self._inside(""))]
        sizes = [self._size(name) for name in (METRICS, WARNINGS, CONFIG)]
        return f"{self.name} {sizes} {hash(tuple(sorted(names)))}"

    def file(self, name: str) -> Path | None:
        """Return the path of a file in the run's folder.

        Args:
            name: relative path; chosen by the program, never by the page.

        Returns:
            None if the file does not exist, or if a symbolic link leads out of the folder of runs.
        """
        path = self.folder / name
        return path if self._safe(path) and path.is_file() else None

    def _size(self, name: str) -> tuple[int, int] | None:
        path = self.file(name)
        with suppress(OSError):
            return (path.stat().st_size, path.stat().st_mtime_ns) if path is not None else None
        return None

    def _read_on(self) -> None:
        if self.file(METRICS) is not None:
            with suppress(OSError):
                self._curves.read_on()

    def _config_text(self) -> str:
        path = self.file(CONFIG)
        return "" if path is None else read_text(path, "its configuration", most=_SETTINGS_BYTES)

    def _tail(self, name: str) -> list[str]:
        """Return the complete lines in the last `_TAIL_BYTES` bytes of a file."""
        path = self.file(name)
        if path is None:
            return []
        with suppress(OSError), path.open("rb") as file:
            start = max(0, path.stat().st_size - _TAIL_BYTES)
            file.seek(start)
            lines = file.read(_TAIL_BYTES).decode("utf-8", "replace").splitlines(keepends=True)
            return [line for line in lines[1 if start else 0 :] if line.endswith("\n")]
        return []

    def _inside(self, folder: str) -> list[Path]:
        place = self.folder / folder
        with suppress(OSError):
            if self._safe(place) and place.is_dir():
                return list(place.iterdir())
        return []

    def _safe(self, path: Path) -> bool:
        return within(path, self._root)


class Runs:
    """The training runs in a folder.

    Args:
        root: the folder; None means that there are no runs.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = None if root is None else Path(root).expanduser().resolve()
        self._known: OrderedDict[str, Run] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Return the names of all runs; the run with the most recent changes is first."""
        found = self._found()
        return sorted(found, key=lambda name: (-_written(found[name]), name))

    def get(self, name: Any) -> Run:
        """Return the run with a name; `name` may be any value that the page sent.

        Raises:
            UserError: `names` has no such name.
        """
        folder = self._found().get(name) if isinstance(name, str) else None
        if folder is None or self._root is None:
            raise UserError("there is no such run. It may have been removed: refresh the list of runs")
        with self._lock:
            run = self._known.pop(name, None) or Run(name, folder, self._root)
            self._known[name] = run
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return run

    def _found(self) -> dict[str, Path]:
        if self._root is None:
            return {}
        return {path.relative_to(self._root).as_posix(): path for path in _walk(self._root, self._root, 1)}


def _walk(folder: Path, root: Path, depth: int) -> Iterator[Path]:
    """Yield the folders of runs; the search does not continue inside a run."""
    count, inner = 0, []
    with suppress(OSError):
        inner = sorted(path for path in folder.iterdir() if path.name[0] != "." and path.is_dir())
    for path in inner:
        if count >= _MOST or path.name in _INSIDE or not within(path, root):
            continue
        if any(within(path / name, root) and (path / name).is_file() for name in (METRICS, CONFIG)):
            count += 1
            yield path
        elif depth < _DEEPEST:
            yield from _walk(path, root, depth + 1)


def within(path: Path, root: Path) -> bool:
    """Whether a path, with symbolic links resolved, is inside a folder.

    Args:
        path: any path.
        root: the folder, already resolved.
    """
    with suppress(OSError, RuntimeError):
        return path.resolve().is_relative_to(root)
    return False


def _written(folder: Path) -> float:
    times = [0.0]
    for name in (METRICS, CONFIG):
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)


def _is_sound(folder: Path) -> bool:
    try:
        read_head(folder)
    except (UserError, OSError):
        return False
    return True


def _without_places(value: Any, known: dict[int, Any] | None = None) -> Any:
    """Return a copy of a configuration in which absolute paths are replaced by file names.

    Args:
        value: the configuration or a part of it, as YAML is read.
        known: copies that exist already, by object id. An object that YAML refers to twice is copied once, and a
            reference of an object to itself becomes None.
    """
    known = {} if known is None else known
    if isinstance(value, str):
        return Path(value).name if os.path.isabs(value) else value
    if not isinstance(value, dict | list):
        return value
    if id(value) not in known:
        known[id(value)] = None
        if isinstance(value, dict):
            known[id(value)] = {key: _without_places(one, known) for key, one in value.items()}
        else:
            known[id(value)] = [_without_places(one, known) for one in value]
    return known[id(value)]
