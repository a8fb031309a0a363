"""The layer type of each block, from a list or from a short text such as `every 2nd:window_delta`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from postgen.errors import SettingError, UserError, did_you_mean, shown
from postgen.lit.options import TYPES

_EVERY = re.compile(r"every (\d{1,9})(st|nd|rd|th)?")
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")

Layers = str | tuple[str, ...]
"""Either one layer type per block, in running order, or a text of comma-separated parts `WHERE:TYPE`.

WHERE is `all`, `every N` (the last block of each N), one block such as `3`, or a range such as `1-8`. If several parts
name a block, the last part decides. Blocks that no part names stay softmax."""


def checked_layers(layers: str | Sequence[str]) -> Layers:
    """Check `layers` and return the value that a config stores: the text itself, or a tuple.

    Raises:
        UserError: an unknown layer type, or a text with a wrong form.
    """
    if isinstance(layers, str):
        _parsed(layers)
        return layers
    if not isinstance(layers, list | tuple) or not layers:
        raise SettingError(
            "layers",
            " must be a text such as 'every 2nd:window_delta' or a list with one layer type per block, got"
            f" {shown(layers)}",
        )
    for kind in layers:
        _check_type(kind)
    return tuple(layers)


def types_of_blocks(layers: Layers, count: int, *, first_block: bool) -> tuple[str, ...]:
    """Return the layer type of each block of a model.

    Args:
        layers: a value that `checked_layers` returned.
        count: number of blocks of the model.
        first_block: whether block 0 may be converted. If False, `all` and `every N` leave block 0 out.

    Raises:
        UserError: `layers` is for another number of blocks, or converts block 0 although `first_block` is False.
    """
    if isinstance(layers, str):
        found = ["softmax"] * count
        for blocks, kind in _parsed(layers):
            for block in blocks(count, first_block):
                found[block] = kind
    else:
        found = list(layers)
    if len(found) != count:
        raise SettingError(
            "layers", f" has {len(found)} layer types, but the model has {count} blocks: give one per block"
        )
    if found[0] != "softmax" and not first_block:
        raise SettingError(
            "layers",
            f" converts block 0 to {found[0]}, but block 0 is the most sensitive one and stays softmax by default:"
            " leave it out, or allow it with --first-block (first_block=True in Python)",
        )
    return tuple(found)


def _parsed(text: str) -> list[tuple[_Where, str]]:
    parts = []
    for part in text.split(","):
        where, colon, kind = (each.strip() for each in part.partition(":"))
        if not colon:
            raise SettingError(
                "layers", f" must be a text of WHERE:TYPE such as 'every 2nd:window_delta', got {shown(text)}"
            )
        _check_type(kind)
        parts.append((_where(where, text), kind))
    return parts


class _Where:
    """A selection of blocks: every `step`-th from `first` to `last`, or to the end if `last` is None.

    `pattern` marks `all` and `every N`, which leave block 0 out unless it may be converted.
    """

    def __init__(self, first: int, step: int, last: int | None, *, pattern: bool) -> None:
        self.first, self.step, self.last, self.pattern = first, step, last, pattern

    def __call__(self, count: int, first_block: bool) -> range:
        """Return the selected blocks of a model with `count` blocks.

        Raises:
            UserError: the model has fewer blocks than the selection names.
        """
        if self.last is not None and self.last >= count:
            raise SettingError("layers", f" names block {self.last}, but the model has blocks 0 to {count - 1}")
        first = self.first
        if self.pattern and first == 0 and not first_block:
            first += self.step
        return range(first, count if self.last is None else self.last + 1, self.step)


def _where(where: str, text: str) -> _Where:
    if where == "all":
        return _Where(0, 1, None, pattern=True)
    if (every := _EVERY.fullmatch(where)) and int(every[1]) > 0:
        step = int(every[1])
        return _Where(step - 1, step, None, pattern=True)
    if blocks := _RANGE.fullmatch(where):
        first, last = int(blocks[1]), int(blocks[2] or blocks[1])
        if first <= last:
            return _Where(first, 1, last, pattern=False)
    raise SettingError(
        "layers",
        f" has {shown(where)} in place of blocks: use all, every N with a space (every 2nd), a block such as 3 or a"
        f" range such as 1-8; got {shown(text)}",
    )


def _check_type(kind: object) -> None:
    if kind not in TYPES:
        raise UserError(
            f"unknown layer type {shown(kind)}. Known: {', '.join(TYPES)}.{did_you_mean(str(kind), TYPES)}"
        )
