"""Images and videos in a folder and its subfolders, with captions beside them or in metadata files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from postgen.errors import UserError, shown
from postgen.prompt_rows import read_rows
from postgen.reading import read_text

_METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True, slots=True)
class Found:
    """A file of a data set, not yet checked."""

    key: str
    """Name of the file or row."""
    path: Path | None
    row: dict[str, Any]
    """Columns of its row."""
    wrong: str
    """What is wrong; empty if nothing is."""
    caption: str | None = None
    """Caption from a text file; None: a column of the row."""
    kind: Literal["image", "video"] | None = None
    """Kind that its column names; None: the suffix decides."""


def folder_files(folder: Path, where: str, suffixes: Sequence[str]) -> list[Found]:
    """Return the images and videos in a folder and its subfolders, in the order of their names.

    The caption of a file is a row of `metadata.jsonl` or `metadata.csv` in its folder or in a folder above it, or else
    the text of NAME.txt beside it. Names that begin with a dot are ignored.

    Args:
        folder: the folder.
        where: name of the data set in messages.
        suffixes: suffixes of images and videos, in lower case.

    Raises:
        UserError: a folder or a metadata file cannot be read.
    """
    files: list[Path] = []
    told: dict[Path, dict[str, Any]] = {}
    wrong: list[Found] = []
    for place, names in _walk(folder, where):
        metadata = [name for name in _METADATA if name in names]
        if len(metadata) > 1:
            raise UserError(f"{where}: {place} has {' and '.join(metadata)}: keep one of them")
        for name in metadata:
            wrong += _read_metadata(place / name, folder, told, where)
        files += [place / name for name in names if Path(name).suffix.lower() in suffixes]
    # Two files with the same NAME would share NAME.txt.
    shared: dict[Path, list[str]] = {}
    for file in files:
        if _plain(file) not in told:
            shared.setdefault(file.with_suffix(".txt"), []).append(file.name)
    return [_file(file, folder, told.get(_plain(file)), shared) for file in files] + wrong


def _file(file: Path, folder: Path, row: dict[str, Any] | None, shared: dict[Path, list[str]]) -> Found:
    key = file.relative_to(folder).as_posix()
    if row is not None:
        return Found(key, file, row, "")
    beside = file.with_suffix(".txt")
    if len(names := shared[beside]) > 1:
        return Found(key, file, {}, f"{' and '.join(names)} have the same name and would share {beside.name}: rename")
    if not beside.is_file():
        return Found(key, file, {}, f"it has no caption: write {beside.name} beside it, or a row in {_METADATA[0]}")
    try:
        caption = read_text(beside, f"its caption {beside.name} cannot be read").strip()
    except UserError as error:
        return Found(key, file, {}, str(error))
    if not caption:
        return Found(key, file, {}, f"its caption {beside.name} is empty: say what it shows")
    return Found(key, file, {"prompt": caption}, "", caption=caption)


def _walk(folder: Path, where: str) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder with the names of its files, in order; a folder that links lead to twice is yielded once."""

    def failed(error: OSError) -> None:
        raise UserError(f"{where}: {error.filename} cannot be read: {error.strerror}")

    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, onerror=failed, followlinks=True):
        targets = {name: os.path.realpath(os.path.join(place, name)) for name in folders if not name.startswith(".")}
        # A folder itself comes before links to it, so that a link that is added does not change names.
        order = sorted(targets, key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        folders.clear()
        for name in order:
            if targets[name] not in seen:
                seen.add(targets[name])
                folders.append(name)
        folders.sort()
        yield Path(place), sorted(name for name in names if not name.startswith("."))


def _read_metadata(file: Path, folder: Path, told: dict[Path, dict[str, Any]], where: str) -> list[Found]:
    """Add the rows of a metadata file to `told`, by file; return the rows that name no file."""
    wrong = []
    for place, row in read_rows(file, where):
        key = f"{file.relative_to(folder).as_posix()}{place.partition(str(file))[2]}"
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name or "\0" in name:
            got = shown(name if isinstance(row, dict) else row)
            wrong.append(Found(key, None, {}, f"file_name is {got}, it must be the path of a file"))
            continue
        path = _plain(file.parent / name)
        if path in told:
            wrong.append(Found(key, None, {}, f"{name} is listed twice"))
        elif not path.is_file():
            wrong.append(Found(key, None, {}, f"there is no file {name}"))
        told[path] = row
    return wrong


def _plain(path: Path) -> Path:
    return Path(os.path.abspath(path))
