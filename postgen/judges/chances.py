"""Which kinds of spoiling the next pairs are of: the ones that the judge still ranks wrongly come more often."""

from __future__ import annotations

import random
from collections.abc import Sequence

_NEWEST = 0.1
"""Weight of the newest pairs in the share that is ranked wrongly."""


class KindChances:
    """Chances of kinds: a part of the draws is even, the rest follows the share of a kind's pairs that was wrong.

    Args:
        kinds: their names.
        hard_share: part of the draws that follows the errors, 0 to 1; 0 draws all kinds alike.
    """

    def __init__(self, kinds: Sequence[str], hard_share: float) -> None:
        self.hard_share = hard_share
        # As a judge that knows nothing: all alike until their pairs have been seen.
        self.errors = dict.fromkeys(kinds, 0.5)

    def chance(self, kind: str) -> float:
        """Chance of a kind in one draw."""
        total = sum(self.errors.values())
        even = 1 / len(self.errors)
        by_error = self.errors[kind] / total if total > 0 else even
        return (1 - self.hard_share) * even + self.hard_share * by_error

    def draw(self, count: int) -> list[str]:
        """So many different kinds, all there are at most, by Python's own random numbers.

        One after the other by their chances, without those drawn before (Efraimidis and Spirakis 2006: the largest of
        u^(1/w)).
        """
        keys = {kind: random.random() ** (1 / max(self.chance(kind), 1e-9)) for kind in self.errors}
        return sorted(keys, key=lambda kind: keys[kind], reverse=True)[:count]

    def note(self, kind: str, wrong: float) -> None:
        """Take in the share of a kind's newest pairs that was ranked wrongly."""
        self.errors[kind] += _NEWEST * (wrong - self.errors[kind])

    def load(self, errors: dict[str, float]) -> None:
        """Take back the `errors` of a checkpoint; kinds that it does not know keep theirs."""
        self.errors |= {kind: float(errors[kind]) for kind in self.errors if kind in errors}
