"""Choose one option for each block or layer: the least sum of errors within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Option = tuple[float, int]
"""The error and the cost of an option. Costs are whole numbers and may be negative."""


class _Step(NamedTuple):
    """A step from one option of a list to a dearer one."""

    gain: float
    """Decrease of the error for each unit of cost."""
    more: int
    """Increase of the cost."""
    place: int
    """Index of the list."""
    option: int
    """Index of the dearer option."""


def greedy(choices: Sequence[Sequence[Option]], allowed: int) -> list[int]:
    """Return the index to take from each list of (error, cost): a good choice with a total cost up to `allowed`.

    It begins with the cheapest options, which must be within the budget, and takes the steps that lower the error most
    for their cost, as long as the budget lasts.
    """
    return _greedy(choices, allowed)[0]


def knapsack(choices: Sequence[Sequence[Option]], allowed: int) -> list[int]:
    """Return the index to take from each list of (error, cost): the least total error with a total cost up to
    `allowed`.

    The cheapest options must be within the budget. The search is exact. List by list it keeps the partial sums that no
    other partial sum beats in both error and cost, and that can still lead to less error than the greedy choice.
    """
    first, price = _greedy(choices, allowed)
    best = sum(choice[index][0] for choice, index in zip(choices, first, strict=True))
    # The least that the remaining lists can cost, and the least error that they can have if a unit of cost is worth
    # `price` (Lagrange's bound): error + price * cost >= bound for all choices, and the cost is at most `allowed`.
    least, bound = [0], [0.0]
    for choice in reversed(choices):
        least.append(least[-1] + min(cost for _, cost in choice))
        bound.append(bound[-1] + min(error + price * cost for error, cost in choice))
    margin = 1e-9 * (abs(best) + price * abs(allowed))
    front: list[tuple[int, float, Taken]] = [(0, 0.0, None)]
    for choice, rest, worth in zip(choices, least[-2::-1], bound[-2::-1], strict=True):
        found = [
            (cost + more, error + added, (taken, place))
            for cost, error, taken in front
            for place, (added, more) in enumerate(choice)
            if cost + more + rest <= allowed
            and error + added + worth - price * (allowed - cost - more) <= best + margin
        ]
        front, lowest = [], float("inf")
        for candidate in sorted(found, key=lambda each: each[:2]):
            if candidate[1] < lowest:
                front.append(candidate)
                lowest = candidate[1]
    return _listed(front[-1][2])


Taken = tuple["Taken", int] | None
"""Indices of a partial sum, the last one first."""


def _listed(taken: Taken) -> list[int]:
    found = []
    while taken is not None:
        taken, place = taken
        found.append(place)
    return found[::-1]


def _greedy(choices: Sequence[Sequence[Option]], allowed: int) -> tuple[list[int], float]:
    """Return the greedy choice, and the gain of the first step that the budget did not allow (0 if it allows all)."""
    chosen, steps = [], []
    for place, choice in enumerate(choices):
        start, *hull = _hull(choice)
        chosen.append(start)
        before = start
        for option in hull:
            more = choice[option][1] - choice[before][1]
            steps.append(_Step((choice[before][0] - choice[option][0]) / more, more, place, option))
            before = option
    left = allowed - sum(choice[option][1] for choice, option in zip(choices, chosen, strict=True))
    price, stopped = 0.0, set()
    for step in sorted(steps, reverse=True):  # gains fall along the hull of a list, so its steps stay in order
        if step.more > left or step.place in stopped:
            price = price or step.gain
            stopped.add(step.place)
            continue
        chosen[step.place] = step.option
        left -= step.more
    return chosen, price


def _hull(choice: Sequence[Option]) -> list[int]:
    """Return the options from the cheapest to the one with the least error, such that each further unit of cost gains
    less than the one before."""
    found: list[int] = []
    for option in sorted(range(len(choice)), key=lambda each: (choice[each][1], choice[each][0])):
        error, cost = choice[option]
        if found and error >= choice[found[-1]][0]:
            continue
        while len(found) > 1:
            (error_a, cost_a), (error_b, cost_b) = choice[found[-2]], choice[found[-1]]
            if (error_a - error_b) * (cost - cost_b) > (error_b - error) * (cost_b - cost_a):
                break
            found.pop()
        found.append(option)
    return found
