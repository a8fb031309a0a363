"""A row of the matrix of bad inputs. It runs in this process, in its own folder, and loads no weights.

A wrong row passes if it ends with one clear line and leaves its folder unchanged. Each kind of input also has correct
rows, which must be accepted, so that the matrix does not pass if everything is refused.
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
"""Content of a file of a row. A function receives the path and creates the file."""

SECONDS = 40
"""Time limit of a row in seconds. A row that reads from a pipe without a writer would never end."""
LONGEST = 2000
"""Largest number of characters of a message, including the paths of temporary folders."""

_UNCLEAR = re.compile(
    r"has no attribute|'NoneType'|unexpected keyword|positional argument|<class '|object at 0x|not subscriptable"
    r"|not supported between|not callable|\[Errno|Traceback|^\W*$"
)
"""Terms of Python that must not appear in a message for users."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One input of the command line (`words`) or of the Python API (`call`)."""

    name: str
    words: tuple[str, ...] = ()
    """Arguments after `postgen`; placeholders such as `{wan}` are replaced by folders of `models`."""
    call: Callable[[Path], Any] | None = None
    """Function that receives the folder of the row."""
    files: Mapping[str, Content] = field(default_factory=dict)
    """Files in the folder of the row, by name."""
    wrong: bool = True
    says: str = ""
    """Pattern that the message must contain."""
    loads: bool = False
    """Whether the error is only found with the weights. Otherwise a wrong row must not load them, and a correct row
    ends there."""
    value: Any = None
    """Expected result of `call`; None: any result. With `either`, an error is allowed too."""
    either: bool = False
    """Whether the input may be refused. If it is accepted, the result must be `value`."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a row."""

    kind: str
    """refused, taken, traceback or blocked."""
    line: str = ""
    value: Any = None
    changed: tuple[str, ...] = ()
    """Files that were created, removed or changed."""


class Loaded(BaseException):
    """Raised when a class of diffusers would load weights."""


class Blocked(BaseException):
    """Raised when the time limit is over."""


def problem(row: Row, models: Mapping[str, Path]) -> str | None:
    """Run a row. Return what is wrong with its result, beginning with the kind of failure; None: nothing is wrong."""
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
    # A term of Python may follow in brackets after an explanation.
    plain = re.sub(r" \([A-Z]\w*Error: .*\)", "", line)
    if "\n" in line.strip("\n") or len(line) > LONGEST or _UNCLEAR.search(plain):
        return f"unclear: {line}"
    if row.says and not re.search(row.says, line):
        return f"unclear: not {row.says!r} but {line}"
    return None


def run(row: Row, models: Mapping[str, Path]) -> Outcome:
    """Run a row and return its result."""
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
        # The time of a folder is ignored: it changes when a check writes a temporary file.
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
    """Replace the two functions through which all classes of diffusers load weights."""
    import diffusers

    def loaded(*_: Any, **__: Any) -> None:
        raise Loaded

    with (
        patch.object(diffusers.DiffusionPipeline, "from_pretrained", loaded),
        patch.object(diffusers.ModelMixin, "from_pretrained", loaded),
        patch.object(diffusers.AutoModel, "from_pretrained", loaded),
    ):
        yield
