"""The table of kinds. Each kind is a function of a random generator that returns a prompt and a clip."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Made = tuple[str, Tensor]
Make = Callable[[random.Random], Made]


@dataclass(frozen=True, slots=True)
class Kind:
    """One way of being right or wrong. `right` is the intended verdict, which may differ from that of a person."""

    name: str
    group: str
    right: bool
    #: Number of clips in the first draw. The fresh draw has half as many.
    count: int
    make: Make


KINDS: dict[str, Kind] = {}


def kind(group: str, *, right: bool, count: int = 3) -> Callable[[Make], Make]:
    """Return a decorator that adds a function to the table under its own name."""

    def enter(make: Make) -> Make:
        name = make.__name__.replace("_", " ")
        assert name not in KINDS, name
        KINDS[name] = Kind(name, group, right, count, make)
        return make

    return enter
