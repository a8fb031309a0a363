"""Items of a data set for fine-tuning: images and videos with captions, from folders, files of rows and `datasets`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from postgen.errors import UserError, check_text, shown
from postgen.prompt_rows import FILES, read_rows
from postgen.reading import check_name
from postgen.training.prompts import made_rows
from postgen.video import PICTURES, VIDEOS

from .dataset_rows import holds_dataset, plain_rows, saved_dataset
from .faults import Fault, check_faults
from .media_folder import Found, folder_files

CAPTIONS = ("prompt", "caption", "text")
"""Columns of the caption, in the order in which they are tried."""
_PATHS = ("/", "./", "../", "~")
"""Beginnings of paths, which no id of a data set has."""

Kind = Literal["image", "video"]

_MEDIA: dict[str, Kind | None] = {"video": "video", "image": "image", "file_name": None}
"""Columns of the file, in the order in which they are tried, and the kind of file; None: its suffix decides."""


@dataclass(frozen=True, slots=True)
class Item:
    """An image or a video with its caption."""

    key: str
    """Name of the item, different for each item: its path as the data set gives it."""
    path: Path
    """The file, or the folder of frames of a video."""
    kind: Kind
    caption: str
    row: dict[str, Any] = field(default_factory=dict, hash=False)
    """All columns of the row."""


def read_items(
    source: Any,
    *,
    caption_column: str | None = None,
    where: str = "train_dataset",
    faults: list[Fault] | None = None,
    files: Path | None = None,
) -> list[Item]:
    """Return the items of a data set. Captions and names are checked; the files themselves are not opened.

    Args:
        source: a folder of images and videos with captions (NAME.txt beside NAME.mp4 or NAME.png, or `metadata.jsonl`
            or `metadata.csv` with `file_name`, as `datasets` reads it; subfolders too); a file of rows with `video`,
            `image` or `file_name` and a caption; a folder, id or object of `datasets`; `package.module:function`; or
            rows.
        caption_column: column of the captions; None: the first of prompt, caption, text that a row has.
        where: name of the data set in messages.
        faults: receives the rows and files that cannot be used; None: they are an error.
        files: folder for images and videos that a data set of `datasets` contains itself.

    Raises:
        UserError: the source cannot be read or has no images and videos; or, without `faults`, an item has no caption,
            its file is missing, or two items have the same name. One message counts all of them.
    """
    found = _found(source, where, files)
    wrong: list[Fault] = []
    items = _checked(found, caption_column, wrong)
    if not found:
        raise UserError(
            f"{where}: {_named(source)} holds no image or video: give files such as .mp4 or .png with captions"
        )
    if faults is None:
        check_faults(wrong, len(found), where)
    else:
        faults += wrong
    return items


def kind_of(path: Path) -> Kind | None:
    """Return whether a path names an image or a video by its suffix; a folder of frames is a video; None: neither."""
    suffix = path.suffix.lower()
    if suffix in PICTURES:
        return "image"
    return "video" if suffix in VIDEOS or os.path.isdir(path) else None


def _named(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__}"


def _found(source: Any, where: str, files: Path | None) -> list[Found]:
    """Return the rows of a source, each with the name and folder of its file."""
    rows: Iterable[Any]
    if isinstance(source, str | Path):
        check_name(str(source), where)
        path = Path(os.path.expanduser(source))
        if os.path.isdir(path):
            if not holds_dataset(path):
                return folder_files(path, where, (*PICTURES, *VIDEOS))
            rows = saved_dataset(path, where)
        elif os.path.isfile(path) or path.suffix.lower() in FILES:
            if path.suffix.lower() in (*PICTURES, *VIDEOS, ".txt"):
                raise UserError(f"{where}: {path} is one file: give its folder, or a JSONL file with a row per clip")
            return [_row(row, place, path.parent) for place, row in read_rows(path, where)]
        elif str(source).startswith(_PATHS) or path.suffix.lower() in (*PICTURES, *VIDEOS):
            raise UserError(f"{where}: there is no file or folder {path}")  # it cannot be the id of a data set
        else:
            rows = made_rows(str(source), where)
    elif not isinstance(source, Iterable):
        raise UserError(f"{where} is {shown(source)}, it must be a folder, a file, a data set or rows")
    else:
        rows = source
    found = [_row(row, f"row {number} of {where}", None) for number, row in enumerate(plain_rows(rows, where, files))]
    # The key of a file that was unpacked is its digest, so that it does not depend on the folder of the cache.
    return [
        replace(each, key=each.path.name) if files and each.path and each.path.parent == files else each
        for each in found
    ]


def _row(row: Any, place: str, base: Path | None) -> Found:
    """Return a row with its file; what is wrong with it is noted in `Found.wrong`."""
    if not isinstance(row, Mapping):
        return Found(place, None, {}, f"it is {shown(row)}, it must be an object with a file and a caption")
    told = {str(key): value for key, value in row.items()}
    column = next((name for name in _MEDIA if told.get(name) not in (None, "")), None)
    if column is None:
        return Found(place, None, told, "it has no column video, image or file_name")
    name = told[column]
    if not isinstance(name, str | Path) or not str(name).strip() or "\0" in str(name):
        return Found(place, None, told, f"{column} is {shown(name)}, it must be the path of a file")
    path = Path(os.path.expanduser(name))
    # Paths are relative to the file of the rows, as in `metadata.jsonl`, or else to the current folder.
    if base is not None and (os.path.exists(base / path) or not os.path.exists(path)):
        path = base / path
    return Found(str(name), path, told, "", kind=_MEDIA[column])


def _checked(found: list[Found], caption_column: str | None, faults: list[Fault]) -> list[Item]:
    items: list[Item] = []
    used: dict[str, set[str]] = {}
    for each in found:
        kind = each.kind or (kind_of(each.path) if each.path else None)
        caption, wrong = each.caption, each.wrong
        if not wrong and caption is None:
            caption, wrong = _caption(each.row, caption_column)
        if not wrong and (each.path is None or not os.path.exists(each.path)):
            wrong = "there is no such file"
        if not wrong and each.path and not (os.path.isfile(each.path) or os.path.isdir(each.path)):
            wrong = "it is not a file"  # reading a named pipe would wait for a writer
        if not wrong and kind is None:
            wrong = f"{each.path.suffix if each.path else ''} is not the suffix of an image or a video"
        place = os.path.abspath(each.path) if each.path else each.key
        if not wrong and caption in used.get(place, ()):
            wrong = "this file is listed twice with the same caption: use a column of weights instead"
        if wrong or each.path is None or caption is None or kind is None:
            faults.append(Fault(each.key, wrong))
            continue
        # A file may have several captions: the items are numbered.
        number = len(used.setdefault(place, set()))
        used[place].add(caption)
        items.append(Item(each.key + (f"@{number + 1}" if number else ""), each.path, kind, caption, each.row))
    return items


def _caption(row: Mapping[str, Any], column: str | None) -> tuple[str | None, str]:
    """Return the caption of a row, and what is wrong with it."""
    names = CAPTIONS if column is None else (column,)
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        return None, f"it has no caption: add a column {' or '.join(names)}"
    caption = row[name]
    if not isinstance(caption, str):
        return None, f"its {name} is {shown(caption)}, it must be a text"
    if not caption.strip():
        return None, f"its {name} is empty: say what it shows"
    try:
        check_text(name, caption)
    except UserError as error:
        return None, str(error)
    return caption.strip(), ""
