"""Rows of `datasets`: folders, objects, and images and videos that a data set contains itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from postgen.errors import UserError, first_line
from postgen.files import replacing
from postgen.video import VideoError, rgb_picture

_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")
_TABLES = (".parquet", ".arrow")
_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"\x1aE\xdf\xa3": ".webm", b"BM": ".bmp"}
"""First bytes of a file -> its suffix; other contents are a video or WebP, see `_suffix`."""


def holds_dataset(folder: Path) -> bool:
    """Return whether a folder is a data set of `datasets` in its own formats, and not one of image or video files."""
    if all((folder / name).is_file() for name in _SAVED[:2]) or (folder / _SAVED[2]).is_file():
        return True
    files = (file for place in (folder, folder / "data") for file in place.glob("*") if file.stem != "metadata")
    return any(file.suffix in _TABLES for file in files)


def saved_dataset(folder: Path, where: str) -> Any:
    """Load a folder that `Dataset.save_to_disk` wrote, or a folder of Parquet files; returns its split `train`.

    Raises:
        UserError: `datasets` is not installed, or cannot load the folder.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{where} {folder} needs datasets: pip install 'postgen[train]'") from error
    saved = any((folder / name).is_file() for name in _SAVED)
    try:
        return datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder), split="train")
    except Exception as error:  # `datasets` raises many kinds of exceptions
        raise UserError(f"{where} {folder} cannot be loaded: {first_line(error)[:200]}") from error


def plain_rows(rows: Iterable[Any], where: str, files: Path | None) -> Iterator[Any]:
    """Yield rows whose columns `video` and `image` are paths; contents without a file are written to a folder.

    Args:
        rows: rows, or a data set of `datasets`, of which the split `train` is used.
        where: name of the data set in messages.
        files: folder for contents without a file; None: they are an error.

    Raises:
        UserError: a data set with several splits has none named `train`, or a content cannot be written.
    """
    if isinstance(rows, Mapping):
        if "train" not in rows:
            raise UserError(f"{where} has the splits {', '.join(map(str, rows))}: give one of them")
        rows = rows["train"]
    for row in _undecoded(rows):
        if not isinstance(row, Mapping):
            yield row
            continue
        given = dict(row)
        for column in ("video", "image"):
            if column in given:
                given[column] = _path(given[column], where, files)
        yield given


def _undecoded(rows: Any) -> Any:
    """Return a data set whose images and videos are not decoded, but are paths or bytes."""
    for name, feature in (getattr(rows, "features", None) or {}).items():
        if hasattr(feature, "decode"):
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def _path(value: Any, where: str, files: Path | None) -> Any:
    """Return the path of an image or a video; values of other kinds are returned unchanged."""
    if isinstance(value, Mapping) and {"bytes", "path"} >= set(value):
        name, content = value.get("path"), value.get("bytes")
        if content is None or (name and Path(name).is_file()):
            return name
        return str(_written(content, Path(name or "").suffix or _suffix(content), where, files))
    if hasattr(value, "save") and hasattr(value, "getbands"):  # a picture of Pillow
        from io import BytesIO

        try:
            rgb_picture(value).save(packed := BytesIO(), "PNG")
        except VideoError:
            return value
        return str(_written(packed.getvalue(), ".png", where, files))
    return value


def _suffix(content: bytes) -> str:
    known = next((suffix for magic, suffix in _SUFFIXES.items() if content.startswith(magic)), None)
    return known or (".webp" if content[8:12] == b"WEBP" else ".mp4")


def _written(content: bytes, suffix: str, where: str, files: Path | None) -> Path:
    if files is None:
        raise UserError(f"{where} contains images or videos without files: give a folder for them (files=)")
    place = files / f"{hashlib.sha256(content).hexdigest()[:32]}{suffix.lower()}"
    if not place.is_file():
        try:
            with replacing(place) as part:
                part.write_bytes(content)
        except OSError as error:
            raise UserError(f"{where}: {files} cannot be written: {error.strerror}") from error
    return place
