"""The table of kinds: each is a function of a random generator that gives a prompt and a clip."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Made = tuple[str, Tensor]
Make = Callable[[random.Random], Made]


@dataclass(frozen=True, slots=True)
class Kind:
    """One way of being right or wrong; `right` is what it was made to be, not what a person says of each clip."""

    name: str
    group: str
    right: bool
    #: Clips of the first draw; the fresh one has half as many.
    count: int
    make: Make


KINDS: dict[str, Kind] = {}


def kind(group: str, *, right: bool, count: int = 3) -> Callable[[Make], Make]:
    """Enter a function into the table under its own name."""

    def enter(make: Make) -> Make:
        name = make.__name__.replace("_", " ")
        assert name not in KINDS, name
        KINDS[name] = Kind(name, group, right, count, make)
        return make

    return enter
