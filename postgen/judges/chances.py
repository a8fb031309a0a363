"""Chooses the corruption kinds of the next pairs: kinds that the judge still ranks wrongly are drawn more often."""

from __future__ import annotations

import random
from collections.abc import Sequence

_NEWEST = 0.1
"""Weight of the newest pairs in the running share of wrongly ranked pairs."""


class KindChances:
    """Probabilities of the kinds: partly uniform, partly proportional to the share of wrongly ranked pairs of a kind.

    Args:
        kinds: names of the kinds.
        hard_share: part of the probability that follows the errors, 0 to 1; 0 draws all kinds uniformly.
    """

    def __init__(self, kinds: Sequence[str], hard_share: float) -> None:
        self.hard_share = hard_share
        # An untrained judge ranks half of the pairs wrongly, so all kinds start with the same error.
        self.errors = dict.fromkeys(kinds, 0.5)

    def chance(self, kind: str) -> float:
        """Return the probability of a kind in one draw."""
        total = sum(self.errors.values())
        even = 1 / len(self.errors)
        by_error = self.errors[kind] / total if total > 0 else even
        return (1 - self.hard_share) * even + self.hard_share * by_error

    def draw(self, count: int) -> list[str]:
        """Draw `count` different kinds, at most all, with Python's global random generator.

        The kinds are drawn one by one with their probabilities w, without replacement: the smallest values of
        -log(u) / w (Efraimidis and Spirakis 2006 take the largest u^(1/w), which underflows for small w).
        """
        keys = {kind: random.expovariate(max(self.chance(kind), 1e-9)) for kind in self.errors}
        return sorted(keys, key=lambda kind: keys[kind])[:count]

    def note(self, kind: str, wrong: float) -> None:
        """Update the error of a kind with the share of its newest pairs that were ranked wrongly."""
        self.errors[kind] += _NEWEST * (wrong - self.errors[kind])

    def load(self, errors: dict[str, float]) -> None:
        """Restore the `errors` of a checkpoint; kinds that the checkpoint does not contain keep their value."""
        self.errors |= {kind: float(errors[kind]) for kind in self.errors if kind in errors}
