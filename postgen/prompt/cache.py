"""A file of enhanced prompts, so that a language model is not asked twice. Light to import."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from postgen.errors import UserError
from postgen.locks import alone, append_line

NAME = "prompts.jsonl"
"""Name of the file in the cache folder."""


def cache_folder() -> Path:
    """Return the folder for the caches of the enhancer.

    It is the environment variable `POSTGEN_CACHE`, or `postgen` in `XDG_CACHE_HOME`, or `~/.cache/postgen`.
    """
    if own := os.environ.get("POSTGEN_CACHE"):
        return Path(own).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache") / "postgen"


def key_of(settings: Mapping[str, Any]) -> str:
    """Return the key of a prompt with all settings that determine its enhanced prompt.

    Args:
        settings: JSON values.

    >>> key_of({"prompt": "a", "seed": 0}) == key_of({"seed": 0, "prompt": "a"})
    True
    """
    text = json.dumps(settings, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class PromptCache:
    """Texts by key in a JSON Lines file.

    Each entry is one line. Several processes can use a file, and a killed process damages at most the line that it
    writes. Damaged lines are skipped with one warning.

    Args:
        path: the file; it is created with its folder on the first entry. None: the entries stay in memory.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self._texts: dict[str, str] = {}
        if self.path is not None and (self.path.exists() or self.path.is_symlink()):
            self._read(self.path)

    def __len__(self) -> int:
        return len(self._texts)

    def get(self, key: str) -> str | None:
        """Return the text of a key, or None."""
        return self._texts.get(key)

    def put(self, key: str, text: str, **notes: Any) -> None:
        """Store a text.

        Args:
            key: the key, from `key_of`.
            text: the text.
            notes: JSON values for people who read the file, such as the prompt.

        Raises:
            UserError: the file cannot be written.
        """
        self._texts[key] = text
        if self.path is None:
            return
        try:
            append_line(self.path, json.dumps({"key": key, "text": text, **notes}, ensure_ascii=False))
        except OSError as error:
            raise UserError(
                f"the cache of prompts {self.path} cannot be written: {error.strerror or error}"
            ) from error

    def _read(self, path: Path) -> None:
        from postgen.reading import read_bytes

        what = f"the cache of prompts {path} cannot be read"
        data = read_bytes(path, what, most=2**30)
        if data and not data.endswith(b"\n"):
            # Another process may be writing this line; if a killed process has left it, nothing changes.
            with suppress(OSError), open(path, "rb") as file, alone(file):
                data = read_bytes(path, what, most=2**30)
        damaged = 0
        for line in data.split(b"\n"):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                key, text = entry["key"], entry["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                damaged += 1
                continue
            if isinstance(key, str) and isinstance(text, str) and text.strip():
                self._texts[key] = text
            else:
                damaged += 1
        if damaged:
            warnings.warn(f"{damaged} damaged lines of the cache of prompts {path} are skipped", stacklevel=4)
