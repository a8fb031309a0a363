"""A row of the matrix of bad inputs, and how it is run: in this process, in a folder of its own, with no model loaded.

A wrong row passes if it ends in one clear line and leaves its folder as it was; each kind has right neighbours, which
must be taken, so that the matrix cannot pass by refusing everything.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from postgen.cli import main
from postgen.errors import UserError, shown

Content = str | bytes | Callable[[Path], object]
"""What is in a file of a row; a function makes what it is given the path of."""

SECONDS = 40
"""Within which a row ends; what reads from a pipe that nobody writes to does not."""
LONGEST = 2000
"""Characters of one clear line, paths of temporary folders included."""

_UNCLEAR = re.compile(
    r"has no attribute|'NoneType'|unexpected keyword|positional argument|<class '|object at 0x|not subscriptable"
    r"|not supported between|not callable|\[Errno|Traceback|^\W*$"
)
"""Words of Python that say nothing to the person at the keyboard."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One input, of the command line (`words`) or of Python (`call`)."""

    name: str
    words: tuple[str, ...] = ()
    """After `postgen`; `{wan}` and the like stand for folders of `models`."""
    call: Callable[[Path], Any] | None = None
    """Given the folder of the row."""
    files: Mapping[str, Content] = field(default_factory=dict)
    """By name, in the folder of the row."""
    wrong: bool = True
    says: str = ""
    """Pattern that the line must contain."""
    loads: bool = False
    """Whether only the weights can tell; else loading them is a failure of a wrong row, and the end of a right one."""
    value: Any = None
    """What `call` must return, unless None; or an error is fine as well, see `either`."""
    either: bool = False
    """Whether it may also be refused: taken, it must be the value."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a row ended."""

    kind: str
    """refused, taken, traceback, blocked."""
    line: str = ""
    value: Any = None
    changed: tuple[str, ...] = ()
    """Files that came, went or are others now."""


class Loaded(BaseException):
    """A class of diffusers was asked for weights."""


class Blocked(BaseException):
    """The time is over."""


def problem(row: Row, models: Mapping[str, Path]) -> str | None:
    """Run a row; return what is wrong with how it ended, beginning with one word for the kind, or None."""
    found = run(row, models)
    if found.kind in ("traceback", "blocked"):
        return f"{found.kind}: {found.line}"
    if found.kind == "taken" and row.wrong:
        return f"silent: taken, as {shown(found.value)}"
    if found.kind == "taken":
        same = row.value is None or (found.value == row.value and type(found.value) is type(row.value))
        return None if same else f"silent: taken as {shown(found.value)} instead of {shown(row.value)}"
    if not row.wrong and not row.either:
        return f"right: refused: {found.line}"
    if found.changed:
        return f"left: {', '.join(found.changed)} changed"
    return _unclear(row, found.line)


def _unclear(row: Row, line: str) -> str | None:
    # What Python says may stand in brackets, behind what it means.
    plain = re.sub(r" \([A-Z]\w*Error: .*\)", "", line)
    if "\n" in line.strip("\n") or len(line) > LONGEST or _UNCLEAR.search(plain):
        return f"unclear: {line}"
    if row.says and not re.search(row.says, line):
        return f"unclear: not {row.says!r} but {line}"
    return None


def run(row: Row, models: Mapping[str, Path]) -> Outcome:
    """Run a row and return how it ended."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        for file, content in row.files.items():
            _make(folder / file, content)
        before = _seen(folder)
        os.chdir(folder)
        try:
            with _limited(), contextlib.nullcontext() if row.loads else _no_weights():
                kind, line, value = _ended(row, folder, models)
        finally:
            os.chdir(here)
        after = _seen(folder)
    changed = {file for file in {*before, *after} if before.get(file) != after.get(file)}
    return Outcome(kind=kind, line=line, value=value, changed=tuple(sorted(changed)))


def _ended(row: Row, folder: Path, models: Mapping[str, Path]) -> tuple[str, str, Any]:
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if row.call is not None:
                return "taken", "", row.call(folder)
            main([_filled(word, models) for word in row.words])
    except UserError as error:
        return "refused", str(error), None
    except Loaded:
        return "taken", "", "a model was loaded"
    except Blocked:
        return "blocked", f"no answer in {SECONDS} s", None
    except SystemExit as error:
        if error.code == 2:
            return "refused", err.getvalue(), None
        if error.code == 0:
            return "taken", "", out.getvalue()
        return "traceback", f"exit code {error.code}: {err.getvalue()[-300:]}", None
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {str(error)[:300]}", None
    raise AssertionError("the command line leaves by SystemExit")


def _filled(word: str, models: Mapping[str, Path]) -> str:
    for name, place in models.items():
        word = word.replace("{" + name + "}", str(place))
    return word


def _make(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        content(path)


def _seen(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        # A folder's time changes when a file that vanishes at once is tried in it.
        found[str(path.relative_to(folder))] = (stat.st_mode, 0 if path.is_dir() else stat.st_mtime_ns)
    return found


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Blocked

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@contextlib.contextmanager
def _no_weights() -> Iterator[None]:
    """Every class of diffusers reads weights through one of two functions."""
    import diffusers

    def loaded(*_: Any, **__: Any) -> None:
        raise Loaded

    with (
        patch.object(diffusers.DiffusionPipeline, "from_pretrained", loaded),
        patch.object(diffusers.ModelMixin, "from_pretrained", loaded),
        patch.object(diffusers.AutoModel, "from_pretrained", loaded),
    ):
        yield
