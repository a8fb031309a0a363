"""Which block gets which layer type, from a list or from a short text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from postgen.errors import UserError, did_you_mean, shown
from postgen.lit.options import TYPES

_EVERY = re.compile(r"every (\d{1,9})(st|nd|rd|th)?")
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")

Layers = str | tuple[str, ...]
"""A type for each block in running order; or a text: parts `WHERE:TYPE` with commas between, of which later ones win,
and what none names stays softmax. WHERE is `all`, `every N` (the last of each N), a block `3` or blocks `1-8`."""


def checked_layers(layers: str | Sequence[str]) -> Layers:
    """Return layers as a config keeps them.

    Raises:
        UserError: a type that there is not, or a text that cannot be read.
    """
    if isinstance(layers, str):
        _parsed(layers)
        return layers
    if not isinstance(layers, list | tuple) or not layers:
        raise UserError(
            f"layers must be a text such as 'every 2nd:window_delta' or a type per block, got {shown(layers)}"
        )
    for kind in layers:
        _check_type(kind)
    return tuple(layers)


def types_of_blocks(layers: Layers, count: int, *, first_block: bool) -> tuple[str, ...]:
    """Return a type for each of a model's blocks.

    Args:
        layers: as `checked_layers` gives them.
        count: blocks of the model.
        first_block: whether block 0 may be converted; `all` and `every N` leave it out otherwise.

    Raises:
        UserError: another number of blocks, or block 0 is named and may not be.
    """
    if isinstance(layers, str):
        found = ["softmax"] * count
        for blocks, kind in _parsed(layers):
            for block in blocks(count, first_block):
                found[block] = kind
    else:
        found = list(layers)
    if len(found) != count:
        raise UserError(f"layers names {len(found)} blocks, the model has {count}")
    if found[0] != "softmax" and not first_block:
        raise UserError(
            f"block 0 is the most sensitive one and stays softmax: give first_block=True (--first-block) to make it"
            f" {found[0]}"
        )
    return tuple(found)


def _parsed(text: str) -> list[tuple[_Where, str]]:
    parts = []
    for part in text.split(","):
        where, colon, kind = (each.strip() for each in part.partition(":"))
        if not colon:
            raise UserError(f"layers is a text of WHERE:TYPE such as 'every 2nd:window_delta', got {shown(text)}")
        _check_type(kind)
        parts.append((_where(where, text), kind))
    return parts


class _Where:
    """Blocks from `first` on, every `step`-th, up to `last`; or all."""

    def __init__(self, first: int, step: int, last: int | None, *, pattern: bool) -> None:
        self.first, self.step, self.last, self.pattern = first, step, last, pattern

    def __call__(self, count: int, first_block: bool) -> range:
        """Return the blocks of a model with so many.

        Raises:
            UserError: it has fewer.
        """
        if self.last is not None and self.last >= count:
            raise UserError(f"layers names block {self.last}, the model has blocks 0 to {count - 1}")
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
    raise UserError(
        f"layers names {shown(where)}: give all, every N, a block or blocks such as 1-8; got {shown(text)}"
    )


def _check_type(kind: object) -> None:
    if kind not in TYPES:
        raise UserError(
            f"there is no layer type {shown(kind)}. Known: {', '.join(TYPES)}.{did_you_mean(str(kind), TYPES)}"
        )
