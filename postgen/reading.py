"""Read small files that a user names, or that lie in a folder that he names: texts and JSON. Light to import."""

from __future__ import annotations

import difflib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from postgen.errors import UserError

LARGEST = 2**26
"""Bytes of a text that is read, 64 MiB."""

_LONGEST, _PART = 4095, 255
"""Bytes of a path, and of each part of it."""
_LOOKED_AT = 1000
"""Names of a folder among which one that is near is looked for."""
_GIVEN = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
"""Streams that a shell has opened, as `<(command)`; whoever writes to them is there."""


def check_name(name: str, said: str) -> None:
    """Refuse the name of a file or folder that no system has.

    Args:
        name: of it.
        said: what the error begins with, before a colon and the reason.

    Raises:
        UserError: it is empty, too long, or holds a null character.
    """
    if not name.strip():
        raise UserError(f"{said}: its name is empty")
    if "\0" in name:
        raise UserError(f"{said}: its name holds a null character")
    if len(os.fsencode(name)) > _LONGEST or any(len(os.fsencode(part)) > _PART for part in name.split("/")):
        raise UserError(f"{said}: its name is too long")


def check_readable(path: str | Path, said: str, *, streams: bool = False) -> None:
    """Refuse what is no file: reading a named pipe waits for a writer, reading a device may never end.

    Args:
        path: of the file.
        said: what the error begins with, before a colon and the reason.
        streams: whether a stream that the shell has opened will do.

    Raises:
        UserError: nothing is there, or something else than a file.
    """
    try:
        kind = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        near = _near(Path(path)) if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"{said}: {_reason(error)}{near}") from error
    if stat.S_ISREG(kind) or (streams and str(path).startswith(_GIVEN) and not stat.S_ISDIR(kind)):
        return
    kinds = {"a folder": stat.S_ISDIR, "a named pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    name = next((name for name, holds in kinds.items() if holds(kind)), "a device")
    raise UserError(f"{said}: it is {name}, a file is needed")


def read_bytes(path: str | Path, said: str, *, most: int = LARGEST) -> bytes:
    """Return the content of a file, or of a stream that the shell has opened.

    Args:
        path: of the file.
        said: what the error begins with, before a colon and the reason.
        most: bytes that it may have.

    Raises:
        UserError: it cannot be read, is no file, or is larger.
    """
    check_readable(path, said, streams=True)
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{said}: {_reason(error)}") from error
    if len(data) > most:
        raise UserError(f"{said}: it is larger than the {most:,} bytes that are read")
    return data


def read_text(path: str | Path, said: str, *, most: int = LARGEST) -> str:
    """Return the content of a file in UTF-8, without a byte order mark; arguments and errors as of `read_bytes`."""
    try:
        return read_bytes(path, said, most=most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{said}: it is no text in UTF-8 ({error.reason}, byte {error.start})") from error


def read_json(path: str | Path, said: str, *, most: int = LARGEST) -> Any:
    """Return the content of a JSON file; arguments and errors as of `read_bytes`."""
    return parse_json(read_text(path, said, most=most), said)


def parse_json(text: str, said: str) -> Any:
    """Return what JSON says.

    Args:
        text: the JSON.
        said: what the error begins with, before a colon and the reason.

    Raises:
        UserError: it is none, or so deep or with so long a number that Python reads it not.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{said}: its lists or objects are nested too deeply") from None
    except ValueError as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "a number has too many digits"
        raise UserError(f"{said}: {reason}") from error


def _near(path: Path) -> str:
    """Name the file beside it, or in the folder `recipes`, that may have been meant; its suffix may be missing."""
    beside: dict[str, str] = {}
    for folder in dict.fromkeys((path.parent, Path("recipes")) if path.parent == Path(".") else (path.parent,)):
        with suppress(OSError):
            for file in sorted(folder.iterdir())[:_LOOKED_AT]:
                if not file.name.startswith(".") and path.suffix in ("", file.suffix) and file.is_file():
                    beside.setdefault(str(file if path.suffix else file.with_suffix("")), str(file))
    near = [place for place in beside if Path(place).name.lower() == path.name.lower()]
    near += difflib.get_close_matches(str(path), beside, 1, 0.8)
    names = {Path(place).name: place for place in reversed(beside)}
    near += [names[name] for name in difflib.get_close_matches(path.name, names, 1, 0.8)]
    return f". Did you mean {beside[near[0]]!r}?" if near else ""


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)
