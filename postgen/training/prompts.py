"""Prompts: rows from a file, a data set or a function, and the order in which training uses them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from postgen.errors import UserError, shown
from postgen.own_code import names_own_code, own_function
from postgen.prompt_rows import FILES, prompt_row, read_prompts
from postgen.sampling.conditions import Row
from postgen.sampling.seeds import Shuffled
from postgen.settings import Part

_OWN = ("prompt", "negative_prompt", "image")
"""Columns that sampling uses; rewards receive all others."""


@dataclass(kw_only=True)
class PromptsConfig(Part):
    """Sources of the training and held-out prompts."""

    part: ClassVar[str] = "prompts"
    files: ClassVar[tuple[str, ...]] = ("train_dataset", "eval_dataset")

    train_dataset: str | None = None
    """Source of the training prompts: a file (JSONL, JSON, CSV, TSV, text), a name or folder for
    `datasets.load_dataset` (split `train`; another split as `org/name:test`), or `package.module:function`. A column
    `prompt` is required. `negative_prompt` and `image` are optional; rewards receive all other columns."""

    eval_dataset: str | None = None
    """Source of the held-out prompts, of the same kinds. None disables evaluation."""

    shuffle_dataset: bool = True
    """Use the prompts in a new random order in each pass over them."""

    precompute_prompt_embeds: bool = False
    """Encode all prompts before training, keep the encodings, and move the text encoders to the CPU."""


class Prompts:
    """Prompt rows in an endless order, random by seed or as given.

    Args:
        source: a source as in `PromptsConfig.train_dataset`, or rows.
        name: name of the source in messages.
        seed: seed of the order.
        shuffle: whether the order is random.

    Raises:
        UserError: the source cannot be read or is empty, or a row has no prompt.
    """

    def __init__(self, source: str | Iterable[Mapping[str, Any]], name: str, *, seed: int, shuffle: bool) -> None:
        self.name, self.seed, self.shuffle = name, seed, shuffle
        rows = _read(source, name)
        if not rows:
            raise UserError(f"{name} has no rows: give prompts, one JSON object per line")
        # Every row gets all columns, with None for missing values, so that a batch of rows always has every column.
        absent = dict.fromkeys(key for row in rows for key in row)
        self.rows = [{**absent, **row} for row in rows]
        self._order = Shuffled(len(rows), seed)

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, position: int) -> Row:
        """Return the row at a position, from 0, of the endless order: all rows, then all rows in another order, ..."""
        return self.rows[self._order.at(position) if self.shuffle else position % len(self.rows)]


def columns(rows: Iterable[Row]) -> dict[str, Any]:
    """Return the columns that rewards receive, as lists: all but `prompt`, `negative_prompt` and `image`."""
    rows = list(rows)
    names = dict.fromkeys(key for row in rows for key in row if key not in _OWN)
    return {name: [row.get(name) for row in rows] for name in names}


def _read(source: str | Iterable[Mapping[str, Any]], name: str) -> list[Row]:
    if isinstance(source, str):
        path = Path(source).expanduser()
        if path.suffix in FILES or path.is_file():
            try:
                return read_prompts(path, name, empty=True)
            except UserError as error:
                if path.exists():
                    raise
                what = (
                    "a file of your own prompts"
                    if name.endswith("dataset")
                    else "a file with prompt and video in each row"
                )
                raise UserError(f"{error}. Give {what}: --{name} FILE") from error
        source = made_rows(source, name)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise UserError(f"{name} is {shown(source)}, it must be a file, a data set, a function or rows of prompts")
    return [prompt_row(row, f"row {number} of {name}") for number, row in enumerate(source)]


def made_rows(source: str, name: str) -> Iterable[Mapping[str, Any]]:
    """Return the rows from a function (`package.module:function`) or a data set of `datasets` (id or folder).

    Args:
        source: the function, or the id or folder of the data set; another split than `train` as `org/name:test`.
        name: name of the source in messages.

    Raises:
        UserError: the function or the data set cannot be loaded, or gives no rows.
    """
    if ":" in source and names_own_code(source):
        function = own_function(source, name)
        if not callable(function):
            raise UserError(f"{name}: {source} is a {type(function).__name__}, not a function that returns rows")
        try:
            rows: Iterable[Mapping[str, Any]] = function()
        except SystemExit as error:
            raise UserError(f"{name}: {source} ended the program instead of returning rows") from error
        if not isinstance(rows, Iterable) or isinstance(rows, str | Mapping):
            raise UserError(f"{name}: {source} returned a {type(rows).__name__}, not rows of prompts")
        return rows
    return _load_dataset(source, name)


def _load_dataset(source: str, name: str) -> Iterable[Mapping[str, Any]]:
    location, _, split = source.rpartition(":")
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name} {source} needs datasets: pip install 'postgen[train]', or give a JSONL file"
        ) from error
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            location or split, split=split if location else "train"
        )
    except Exception as error:  # `datasets` and the hub raise many kinds of exceptions
        place = "" if Path(location or split).exists() else "there is no such file or folder, and as a data set: "
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name} {source} cannot be loaded: {place}{reason}") from error
    return rows
