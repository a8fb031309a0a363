"""The file of measurements: one line per file, so that a stopped curation continues, and thresholds may change."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from postgen.errors import UserError
from postgen.locks import append_line
from postgen.training.digests import digest

from .config import CurationConfig
from .measured import Measured


class MeasureStore:
    """Measurements of earlier calls, by file and settings.

    An incomplete line is ignored, so a kill loses at most the file that was being measured. Several processes may
    write the file. Files that cannot be read are not stored: they are tried again.

    Args:
        path: the JSONL file.
        config: the settings; those that change measurements are part of the key.

    Raises:
        UserError: the file exists and is not a file of measurements.
    """

    def __init__(self, path: Path, config: CurationConfig) -> None:
        self.path, self._settings = path, config.measured()
        self._known: dict[str, Measured] = {}
        self._load()

    def __len__(self) -> int:
        return len(self._known)

    def _load(self) -> None:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"cannot read the measurements {self.path}: {error.strerror or error}") from error
        lines = data.split(b"\n")
        for line in lines:
            with suppress(ValueError, TypeError, KeyError, AttributeError):  # incomplete, or of another version
                told = json.loads(line)
                self._known[told["key"]] = Measured.from_dict(told["measured"])
        if data.strip() and not self._known and (len(lines) > 1 or not data.startswith(b'{"key": "')):
            raise UserError(
                f"{self.path} exists and holds no measurements of `postgen curate`: move it or give another output"
            )

    def key(self, path: Path) -> str:
        """Return the key of a file: its path, size, time of change and the settings.

        Raises:
            OSError: the file does not exist.
        """
        told = [os.stat(path), *(os.stat(one) for one in sorted(path.iterdir()))] if path.is_dir() else [os.stat(path)]
        return digest([self._settings, str(path.resolve()), [(one.st_size, one.st_mtime_ns) for one in told]])

    def get(self, key: str) -> Measured | None:
        """Return the measurements of an earlier call; None without them."""
        return self._known.get(key)

    def add(self, key: str, measured: Measured) -> None:
        """Append measurements to the file.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            append_line(self.path, json.dumps({"key": key, "measured": measured.to_dict()}))
        except OSError as error:
            raise UserError(f"cannot write the measurements {self.path}: {error.strerror or error}") from error
        self._known[key] = measured
