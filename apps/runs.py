"""Training runs as the page shows them: found by the server, read as they grow, never outside their folder."""

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
from postgen.grpo.curves import Curves
from postgen.reading import parse_json, read_text
from postgen.training.checkpoint_head import read_head
from postgen.training.warning_log import NAME as WARNINGS

METRICS, CONFIG = "metrics.jsonl", "config.yaml"
"""What makes a folder a run: one of the two."""
_DEEPEST, _MOST = 3, 500
"""Folders inside folders that are looked through for runs, and runs that are listed."""
_KEPT = 16
"""Runs whose curves stay in memory."""
_SETTINGS_BYTES, _TAIL_BYTES = 2**18, 2**16
"""Of a configuration, and of the end of the file of warnings."""
_SAMPLE = re.compile(r"step-(\d{1,12})\.png")
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
_INSIDE = ("samples", "completions", "export")
"""Folders of a run that are none themselves."""
_QUIET, _STEPS = 120.0, 20
"""A run without a new line for so many seconds, and so many of its steps, is said to stand still."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The samples of fixed seeds of one evaluation."""

    step: int
    sheet: Path
    """A picture: a row of frames for each clip."""
    video: Path | None
    """The clips side by side; None of pictures, and where there was no ffmpeg."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in a run's folder."""

    step: int
    bytes: int
    sound: bool
    """Whether all files are there with their sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """How far a run is."""

    step: int
    total: int
    """0 where its configuration does not say."""
    step_time: float | None
    """Seconds a step, of the last line."""
    age: float | None
    """Seconds since the last line; None without any."""

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return bool(self.total) and self.step >= self.total

    @property
    def writes(self) -> bool:
        """Whether new lines may come."""
        quiet = max(_QUIET, _STEPS * (self.step_time or 0.0))
        return not self.done and self.age is not None and self.age < quiet

    @property
    def seconds_left(self) -> float | None:
        """Of a run that writes; None where that is not known."""
        if not self.writes or not self.total or not self.step_time:
            return None
        return max(0.0, (self.total - self.step) * self.step_time - (self.age or 0.0))


class Run:
    """One run, whose files are read where they are new.

    Args:
        name: what the page calls it.
        folder: its own.
        root: the folder of all runs, outside which nothing is read.
    """

    def __init__(self, name: str, folder: Path, root: Path) -> None:
        self.name, self.folder, self._root = name, folder, root
        self._curves = Curves(folder / METRICS, wanted=lambda metric: True)
        self._lock = threading.Lock()

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Return the points of each metric, those of new lines too; of long runs those that matter to the eye."""
        with self._lock:
            self._read_on()
            return self._curves.points()

    def newest(self) -> dict[str, float | None]:
        """Return the last value of each metric; None of one that was no number (NaN, infinity)."""
        with self._lock:
            self._read_on()
            return dict(self._curves.newest)

    def standing(self) -> Standing:
        """Return how far it is."""
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
        """Return its configuration; nothing where that is missing or none."""
        with suppress(UserError, yaml.YAMLError, RecursionError):
            found = yaml.safe_load(self._config_text())
            return found if isinstance(found, dict) else {}
        return {}

    def recipe(self) -> str:
        """Return its configuration as YAML; of a place on this machine the name alone."""
        return yaml.safe_dump(_without_places(dict(self.settings())), sort_keys=False, allow_unicode=True, width=100)

    def samples(self) -> list[Sample]:
        """Return the samples of fixed seeds, in the order of their steps."""
        found = []
        for path in self._inside("samples"):
            match = _SAMPLE.fullmatch(path.name)
            if match is not None and self.file(f"samples/{path.name}") is not None:
                video = self.file(f"samples/{path.with_suffix('.mp4').name}")
                found.append(Sample(int(match[1]), path, video))
        return sorted(found, key=lambda sample: sample.step)

    def warnings(self, most: int = 20) -> list[dict[str, Any]]:
        """Return the last warnings, the newest first: `step`, `text`, `time`, and `times` it came in a row."""
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
        """Return its checkpoints, the newest first."""
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
        """Return a text that changes when there is something new to show beside the curves."""
        names = [path.name for path in (*self._inside("samples"), *self._inside(""))]
        sizes = [self._size(name) for name in (METRICS, WARNINGS, CONFIG)]
        return f"{self.name} {sizes} {hash(tuple(sorted(names)))}"

    def file(self, name: str) -> Path | None:
        """Return one of its files by a name that a program gives; None where there is none, or it leads elsewhere."""
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
        """The whole lines at the end of a file."""
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
    """The runs in a folder.

    Args:
        root: the folder; None has none.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = None if root is None else Path(root).expanduser().resolve()
        self._known: OrderedDict[str, Run] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Return the names of all runs, that which was written last first."""
        found = self._found()
        return sorted(found, key=lambda name: (-_written(found[name]), name))

    def get(self, name: Any) -> Run:
        """Return a run by a name of `names`, of whatever type and content the page sent.

        Raises:
            UserError: there is none of that name.
        """
        folder = self._found().get(name) if isinstance(name, str) else None
        if folder is None or self._root is None:
            raise UserError("there is no such run: it may have been removed, reload the list")
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
    """Yield the folders of runs, of which none is looked into."""
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
    """Whether a path leads, through all links, into a folder, whose own place has none."""
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
    """Return a configuration in which a place is a name; what YAML names twice is copied once, a loop is cut."""
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
