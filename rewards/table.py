"""The table of `postgen score`: one row per clip, written when the clip is done; the next run reads it again."""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

import postgen
from postgen.errors import UserError, is_number, shown
from postgen.files import replacing
from postgen.rewards.base import Reward
from postgen.rewards.scoring import Clip

SUFFIXES = (".jsonl", ".csv")
"""Allowed suffixes of a table."""
_ENDS = ("no_score", "error", "key")
_BEGIN = '{"file": '
"""Beginning of a row of a JSONL table."""
_ODD = "backslashreplace"
"""Error handler for file names that are not UTF-8, because a table is UTF-8."""


def setting_of(rewards: Sequence[Reward], texts: Sequence[str], device: str) -> str:
    """Return a hash that changes with the rewards: their options, their code, and the files that the options name.

    Args:
        rewards: the reward objects.
        texts: the texts by which the user requested them.
        device: device of the rewards.
    """
    parts = [postgen.__version__, device]
    for reward, text in zip(rewards, texts, strict=True):
        named = [place for place in re.findall(r"""['"]([^'"]+)['"]""", text) if os.path.exists(place)]
        parts += [reward.name, text, _code(reward), *(_stamp(Path(place)) for place in named)]
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()


def _code(reward: Reward) -> str:
    function: Any = reward.function
    while hasattr(function, "func"):  # options are bound with a partial
        function = function.func
    try:
        file = inspect.getsourcefile(function if inspect.isroutine(function) else type(function))
        return hashlib.sha256(Path(file or "").read_bytes()).hexdigest()
    except (TypeError, OSError):
        return ""


def _stamp(path: Path) -> str:
    """Return a hash of path, size and modification time of a file, or of all files in a folder and its subfolders."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    told = [f"{file} {(state := file.stat()).st_size} {state.st_mtime_ns}" for file in files]
    # File names need not be UTF-8.
    return hashlib.sha256("\n".join(told).encode(errors="surrogatepass")).hexdigest()


def set_keys(clips: Sequence[Clip], setting: str) -> None:
    """Set the key of each clip from its file, prompt, columns and the setting (`setting_of`)."""
    for clip in clips:
        try:
            stamp = _stamp(clip.path)
        except OSError:
            stamp = ""
        told = json.dumps([setting, stamp, str(clip.path), clip.prompt, clip.columns], default=str, sort_keys=True)
        clip.key = hashlib.sha256(told.encode()).hexdigest()[:16]


def check_table(path: Path) -> None:
    """Check that a table of this name would not replace other content.

    Raises:
        UserError: the file exists and is not a table of `Table`, or it cannot be read.
    """
    lines = [line for line in _text_of(path).removeprefix("\ufeff").split("\n") if line.strip()]
    found: set[str] = set()
    if path.suffix == ".csv":
        with suppress(csv.Error):
            found = set(next(csv.reader(lines[:1]), []))
    else:
        found = {name for row in _rows(path) for name in row}
        if len(lines) == 1 and lines[0].startswith(_BEGIN):
            return  # the process was killed while it wrote the first row
    missing = [name for name in ("file", "prompt", *_ENDS) if name not in found]
    if lines and missing:
        raise UserError(
            f"{path} exists and is not a table of `postgen score` (it has no column {missing[0]!r}):"
            " give another output"
        )


class Table:
    """A JSONL or CSV file of rows; an interruption never leaves an incomplete row in it.

    Rows of an old file are kept if their key is that of a clip and they have no error. Other rows are removed. After
    the `with` block the rows are in the order of the clips. If the block ends with an exception, the rows stay in the
    order in which they were written, and the same command continues from there.

    Args:
        path: file with one of the `SUFFIXES`.
        clips: all clips that are to be scored, with prompts and keys.
        names: names of the rewards.
        added: names of further columns of `Clip.scores`, which are derived from the scores of the rewards.

    Raises:
        UserError: the file cannot be written or read.
    """

    def __init__(self, path: Path, clips: Sequence[Clip], names: Sequence[str], added: Sequence[str] = ()) -> None:
        self.path, self.clips, self.names, self.columns = path, clips, names, (*names, *added)
        self._written: list[Clip] = []
        self._file = -1
        self._new = False
        self._held: list[int] = []
        if path.suffix not in SUFFIXES:
            raise UserError(f"a table must end in {' or '.join(SUFFIXES)}, got {path}")

    def resume(self) -> int:
        """Copy the scores of clips from the old file; return the number of clips that are done."""
        old = {row["key"]: row for row in _rows(self.path) if row.get("key") and not row.get("error")}
        for clip in self.clips:
            row = old.get(clip.key, {})
            # A row of another form was not written by this class; its clip is scored again.
            with suppress(KeyError, ValueError):
                clip.scores = {name: _number(row[name]) for name in self.names}
                clip.reasons = _reasons(row.get("no_score"), self.names)
        return sum(clip.done for clip in self.clips)

    def __enter__(self) -> Self:
        try:
            self._claim()
            self._replace([clip for clip in self.clips if clip.done])
        except BaseException:
            if self._new:
                with suppress(OSError):
                    os.unlink(os.path.realpath(self.path))
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._written != list(self.clips):
                self._replace(self.clips)
        finally:
            self._close()

    @property
    def count(self) -> int:
        """Number of rows in the file."""
        return len(self._written)

    def add(self, clip: Clip) -> None:
        """Write the complete row of a clip, or nothing if writing fails."""
        data = memoryview(self._text([clip]).encode(errors=_ODD))
        end = os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except BaseException as error:
            os.ftruncate(self._file, end)
            if isinstance(error, OSError):
                raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
            raise
        self._written.append(clip)

    def _claim(self) -> None:
        """Lock the table; create an empty one if necessary, so that concurrent commands lock the same file."""
        while True:
            new, place = False, Path(os.path.realpath(self.path))  # a link may point to a missing file
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                new = True
            except FileExistsError:
                pass
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
            self._lock(self.path)
            self._new = new
            with suppress(OSError):
                if not self._held or os.path.samestat(os.fstat(self._held[-1]), self.path.stat()):
                    return
            self._close()  # another process has replaced or deleted the file since
            self._new = False

    def _replace(self, clips: Sequence[Clip]) -> None:
        head = "" if self.path.suffix == ".jsonl" else self._csv([])
        try:
            with replacing(self.path) as part:
                part.write_text(head + self._text(clips), encoding="utf-8", errors=_ODD, newline="")
                self._lock(part)
            self._new = False
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            self._held.append(self._file)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._written = list(clips)

    def _lock(self, path: Path) -> None:
        """Lock the table against other processes until `_close`. The lock is one of the system and leaves no file."""
        if fcntl is None or not path.is_file():
            return
        self._held.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        try:
            fcntl.flock(self._held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing {self.path}: wait until it ends, stop it, or choose another table"
            ) from None
        except OSError:
            return  # a file system without locks

    def _close(self) -> None:
        while self._held:
            os.close(self._held.pop())

    def _text(self, clips: Sequence[Clip]) -> str:
        rows = [clip.to_dict(self.columns) for clip in clips]
        if self.path.suffix == ".jsonl":
            return "".join(json.dumps(row) + "\n" for row in rows)
        return self._csv(rows) if rows else ""

    def _csv(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Return the CSV rows, or the header if there are none."""
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, ["file", "prompt", *self.columns, *_ENDS])
        writer.writerows(rows) if rows else writer.writeheader()
        return buffer.getvalue()


def _rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a table; incomplete rows and other content are skipped."""
    text = _text_of(path)
    if path.suffix == ".csv":
        try:
            return [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
        except csv.Error:
            return []
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        rows += [row] if isinstance(row, dict) and isinstance(row.get("key"), str) else []
    return rows


def _text_of(path: Path) -> str:
    """Return the content of a table, which is empty if there is no file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _reasons(cell: Any, names: Sequence[str]) -> dict[str, str]:
    """Split the cell `NAME: text; NAME: text` into one text per reward."""
    one = "|".join(map(re.escape, names))
    parts = re.split(rf"(?:^|; )({one}): ", cell if isinstance(cell, str) else "")
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _number(value: Any) -> float | None:
    """Return the score in a cell, None for an empty cell; raise a ValueError for anything else."""
    if value is None or value == "":
        return None
    number = float(value) if isinstance(value, str) else value
    if not is_number(number):
        raise ValueError(f"{shown(value)} is not a score")
    return float(number)
