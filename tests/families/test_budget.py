"""The knapsack finds the best of all choices, and the greedy choice is not far from it."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence

import pytest

from postgen.families.budget import greedy, knapsack


def test_the_knapsack_is_exact() -> None:
    draw = random.Random(0)
    for _ in range(200):
        choices = [
            [(0.0, 0), *((draw.choice((draw.random(), 0.5)), -draw.randrange(9)) for _ in range(2))] for _ in range(5)
        ]
        least = sum(min(cost for _, cost in choice) for choice in choices)
        allowed = draw.randrange(least, 1)
        every = itertools.product(*(range(3) for _ in choices))
        best = min(error for error, cost in (added(choices, each) for each in every) if cost <= allowed)
        error, cost = added(choices, knapsack(choices, allowed))
        assert cost <= allowed
        assert error == pytest.approx(best, abs=1e-12)
        error, cost = added(choices, greedy(choices, allowed))
        assert cost <= allowed
        assert error >= best - 1e-12


def test_hundreds_of_layers_take_little_time() -> None:
    draw = random.Random(0)
    choices = []
    for _ in range(400):
        size, hardness = draw.choice([1536 * 1536, 1536 * 8960, 5120 * 5120]), draw.lognormvariate(0, 1)
        choices.append(
            [(hardness * 4.0**-bits * draw.uniform(0.8, 1.2), size * bits // 8) for bits in (2, 3, 4, 6, 8)]
        )
    allowed = sum(choice[2][1] for choice in choices)
    begun = time.perf_counter()
    best = added(choices, knapsack(choices, allowed))
    assert time.perf_counter() - begun < 5
    near = added(choices, greedy(choices, allowed))
    assert max(best[1], near[1]) <= allowed
    assert best[0] <= near[0] <= 1.001 * best[0]


def test_a_budget_for_the_dearest_and_for_the_cheapest_only() -> None:
    choices = [[(1.0, 1), (0.5, 4), (2.0, 9)], [(3.0, 0), (0.0, 7)]]
    for choose in (greedy, knapsack):
        assert choose(choices, 11) == [1, 1]
        assert choose(choices, 1) == [0, 0]


def added(choices: Sequence[Sequence[tuple[float, int]]], taken: Sequence[int]) -> tuple[float, int]:
    """Return the sum of errors and the sum of costs of some choices."""
    pairs = [choice[place] for choice, place in zip(choices, taken, strict=True)]
    return sum(error for error, _ in pairs), sum(cost for _, cost in pairs)
