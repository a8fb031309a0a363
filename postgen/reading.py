"""Read small text and JSON files that a user names, or that are in a folder that a user names. Light to import."""

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
"""Default largest size of a file in bytes: 64 MiB."""

_LONGEST, _PART = 4095, 255
"""Largest number of bytes of a path, and of each part of a path."""
_LOOKED_AT = 1000
"""Largest number of files of a folder that are compared to suggest a similar name."""
_GIVEN = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
"""Paths of streams that a shell has opened, such as `<(command)`. Reading them cannot hang: their writer exists."""


def check_name(name: str, said: str) -> None:
    """Check that a name can be the name of a file or folder.

    Args:
        name: the name.
        said: beginning of the error message, before a colon and the reason.

    Raises:
        UserError: the name is empty, too long, or contains a null character.
    """
    if not name.strip():
        raise UserError(f"{said}: its name is empty")
    if "\0" in name:
        raise UserError(f"{said}: its name contains a null character")
    if len(os.fsencode(name)) > _LONGEST or any(len(os.fsencode(part)) > _PART for part in name.split("/")):
        raise UserError(f"{said}: its name is too long")


def check_readable(path: str | Path, said: str, *, streams: bool = False) -> None:
    """Check that a path is a file.

    Reading a named pipe would wait for a writer, and reading a device might never end.

    Args:
        path: path of the file.
        said: beginning of the error message, before a colon and the reason.
        streams: whether a stream that a shell has opened is allowed too.

    Raises:
        UserError: the path does not exist, or is not a file.
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
    """Return the content of a file, or of a stream that a shell has opened.

    Args:
        path: path of the file.
        said: beginning of the error message, before a colon and the reason.
        most: largest allowed size in bytes.

    Raises:
        UserError: the file cannot be read, is not a file, or is too large.
    """
    check_readable(path, said, streams=True)
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{said}: {_reason(error)}") from error
    if len(data) > most:
        raise UserError(f"{said}: it is larger than the allowed {most:,} bytes")
    return data


def read_text(path: str | Path, said: str, *, most: int = LARGEST) -> str:
    """Return the content of a UTF-8 file without its byte order mark; arguments and errors as in `read_bytes`."""
    try:
        return read_bytes(path, said, most=most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{said}: it is not UTF-8 text ({error.reason}, byte {error.start})") from error


def read_json(path: str | Path, said: str, *, most: int = LARGEST) -> Any:
    """Return the value of a JSON file; arguments and errors as in `read_bytes` and `parse_json`."""
    return parse_json(read_text(path, said, most=most), said)


def parse_json(text: str, said: str) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the JSON text.
        said: beginning of the error message, before a colon and the reason.

    Raises:
        UserError: the text is not valid JSON, is nested too deeply for Python, or contains a number with too many
            digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{said}: its lists or objects are nested too deeply") from None
    except ValueError as error:
        wrong = isinstance(error, json.JSONDecodeError)
        reason = f"it is not valid JSON ({error})" if wrong else "a number has too many digits"
        raise UserError(f"{said}: {reason}") from error


def _near(path: Path) -> str:
    """Return a suggestion for a file that does not exist: a similar name in its folder, or in the folder `recipes`.

    The path may lack the suffix. The result is empty if no name is similar.
    """
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
