"""The choices of the router on disk: one JSON file for all processes and GPUs."""

from __future__ import annotations

import functools
import json
import os
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from postgen.files import replacing

if TYPE_CHECKING:
    from postgen.kernels.attention.router import Problem


def cache_file() -> Path:
    """Return the path of the file: `$XDG_CACHE_HOME/postgen/attention.json`, where the default is `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "postgen" / "attention.json"


class Store:
    """A JSON file: device and versions -> problem -> {"backend": name, "ms": {name: milliseconds}}.

    An unreadable file counts as empty and is replaced at the next choice. If the file cannot be written, the store
    warns once and keeps the choices in memory.
    """

    def __init__(self, path: Path, packages: tuple[str, ...] = ()) -> None:
        """Open a store.

        Args:
            path: the JSON file; it need not exist.
            packages: distributions. A choice is valid only for the installed versions of them and of torch.
        """
        self.path, self.packages = path, packages
        self._choices: dict[str, Any] | None = None
        self._writable = True

    def get(self, problem: Problem) -> str | None:
        """Return the name of the backend that was chosen for a problem, or None if there is no choice."""
        if self._choices is None:
            self._choices = self._read()
        row = self._section(self._choices, problem).get(str(problem))
        name = row.get("backend") if isinstance(row, dict) else None
        return name if isinstance(name, str) else None

    def put(self, problem: Problem, name: str, milliseconds: dict[str, float]) -> None:
        """Save a choice; choices that other processes have written meanwhile are kept."""
        self._choices = self._read()
        row = {"backend": name, "ms": {each: round(value, 4) for each, value in milliseconds.items()}}
        section = self._section(self._choices, problem)
        section[str(problem)] = row
        self._choices[self._place(problem)] = section
        if not self._writable:
            return
        try:
            with replacing(self.path) as part:
                part.write_text(json.dumps(self._choices, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        except OSError as error:
            self._writable = False
            warnings.warn(f"attention times are not saved: {self.path} cannot be written ({error})", stacklevel=2)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        known = found if isinstance(found, dict) else {}
        # If the file cannot be written, keep the choices that this process has made in memory.
        return known if self._writable or self._choices is None else self._choices

    def _section(self, choices: dict[str, Any], problem: Problem) -> dict[str, Any]:
        found = choices.get(self._place(problem))
        return found if isinstance(found, dict) else {}

    def _place(self, problem: Problem) -> str:
        return f"{_device_name(problem.device)}; {_versions(self.packages)}"


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _versions(packages: tuple[str, ...]) -> str:
    found = [f"torch {torch.__version__}", f"cuda {torch.version.cuda}"]
    if torch.backends.cudnn.is_available():
        found.append(f"cudnn {torch.backends.cudnn.version()}")
    there = {name: installed_version(name) for name in sorted({*packages} - {"torch"})}
    found += [f"{name} {each}" for name, each in there.items() if each is not None]
    return ", ".join(found)


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
