"""Weights of checkpoints in an average, and the decay of the learning rate that each average emulates.

For checkpoints theta_0, ..., theta_k of one run and weights c_0, ..., c_k with sum 1,

    sum_j c_j theta_j = theta_0 + sum_i w_i (theta_i - theta_(i-1)),    w_i = c_i + ... + c_k,  i = 1, ..., k.

So an average of checkpoints is the run with its i-th increment scaled by w_i, as a decaying learning rate would scale
it. The inverse is c_0 = 1 - w_1, c_i = w_i - w_(i+1), c_k = w_k (WSM, arXiv:2507.17634; PMA, arXiv:2505.12082).
Light to import.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from postgen.errors import SettingError, UserError, check_number, did_you_mean, is_number, shown

_DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "1-sqrt": lambda t: 1 - math.sqrt(t),
}
"""Decay of the learning rate from 1 at t = 0 to 0 at t = 1."""

KINDS = ("sma", "wma", "ema", *_DECAYS)
"""Kinds of averages: the simple mean, the mean with weights 1, 2, 3, ..., the exponential average, and the decays of
the learning rate. `linear` is equal to `sma`."""

ALPHA = 0.2
"""Default weight of each new checkpoint in the exponential average (arXiv:2505.12082 uses 0.1 and 0.2)."""

_ROUNDING = 1e-9
"""Largest difference between two sums of weights that are meant to be equal."""


def weights_of(kind: str, count: int, *, alpha: float = ALPHA) -> list[float]:
    """Return the weights of checkpoints in an average.

    Args:
        kind: one of `KINDS`.
        count: number of checkpoints, at least 1.
        alpha: for `ema`, the weight of each new checkpoint, from 0 (excluded) to 1.

    Returns:
        `count` weights >= 0 with sum 1, in the order of the checkpoints, the oldest first.

    Raises:
        UserError: the kind is unknown, or a number is outside its range.

    >>> weights_of("sma", 4), weights_of("wma", 3), weights_of("linear", 4)
    ([0.25, 0.25, 0.25, 0.25], [0.16666666666666666, 0.3333333333333333, 0.5], [0.25, 0.25, 0.25, 0.25])
    """
    check_kind(kind)
    check_number("count", count, 1, whole=True)
    if kind in ("sma", "linear"):
        return [1 / count] * count
    if kind == "wma":
        return normalised(range(1, count + 1), count)
    if kind == "ema":
        check_alpha(alpha)
        return [(1 - alpha) ** (count - 1), *(alpha * (1 - alpha) ** (count - 1 - j) for j in range(1, count))]
    return weights_of_curve(decay(kind, count))


def check_kind(kind: str) -> None:
    """Check that a kind is one of `KINDS`.

    Raises:
        UserError: it is not.
    """
    if kind not in KINDS:
        near = did_you_mean(kind, KINDS) if isinstance(kind, str) else ""
        raise SettingError("kind", f" must be one of {', '.join(KINDS)}, got {shown(kind)}.{near}")


def check_alpha(alpha: float) -> None:
    """Check the weight of each new checkpoint in an exponential average.

    Raises:
        UserError: it is not a number, not above 0, or above 1.
    """
    if not is_number(alpha) or not 0 < alpha <= 1:
        raise SettingError("alpha", f" must be above 0 and at most 1, got {shown(alpha)}")


def decay(kind: str, count: int) -> list[float]:
    """Return the multipliers w_1, ..., w_k of a decay of the learning rate over `count` = k + 1 checkpoints.

    Args:
        kind: linear, cosine or 1-sqrt.
        count: number of checkpoints.

    Returns:
        `count` - 1 multipliers: the decay at 1 / count, 2 / count, ...

    >>> decay("linear", 4)
    [0.75, 0.5, 0.25]
    """
    return [_DECAYS[kind](i / count) for i in range(1, count)]


def weights_of_curve(curve: Sequence[float]) -> list[float]:
    """Return the weights of checkpoints that emulate multipliers of the learning rate.

    Args:
        curve: w_1, ..., w_k: the multiplier of each increment between two checkpoints, from 1 to 0, non-increasing.

    Returns:
        k + 1 weights >= 0 with sum 1; of one checkpoint if the curve is empty.

    Raises:
        UserError: a multiplier is not a number from 0 to 1, or is larger than the one before it.

    >>> weights_of_curve([1, 0.5]), weights_of_curve([])
    ([0.0, 0.5, 0.5], [1.0])
    """
    for number, value in enumerate(curve, 1):
        if not is_number(value) or not 0 <= value <= 1:
            raise SettingError("curve", f" must hold numbers from 0 to 1, number {number} is {shown(value)}")
        if number > 1 and value > curve[number - 2]:
            raise SettingError(
                "curve", f" must not increase: number {number} is {value:g}, the one before it {curve[number - 2]:g}"
            )
    steps = [1.0, *map(float, curve), 0.0]
    return [before - after for before, after in itertools.pairwise(steps)]


def curve_of(weights: Sequence[float]) -> list[float]:
    """Return the multipliers of the learning rate that an average of checkpoints emulates.

    Args:
        weights: c_0, ..., c_k with sum 1.

    Returns:
        w_1, ..., w_k; empty for one checkpoint.

    Raises:
        UserError: a weight is not a number, there are none, or their sum is not 1.

    >>> curve_of([0.25, 0.25, 0.25, 0.25]), curve_of([1])
    ([0.75, 0.5, 0.25], [])
    """
    _check_numbers(weights)
    if abs(math.fsum(weights) - 1) > _ROUNDING:
        raise SettingError("weights", f" must have the sum 1, it is {math.fsum(weights):g}")
    return [math.fsum(weights[i:]) for i in range(1, len(weights))]


def normalised(weights: Sequence[float], count: int) -> list[float]:
    """Return weights divided by their sum.

    Args:
        weights: numbers >= 0, one for each checkpoint.
        count: number of checkpoints.

    Raises:
        UserError: the number of weights is not `count`, a weight is negative or no number, or all are 0.

    >>> normalised([3, 1], 2)
    [0.75, 0.25]
    """
    if len(weights) != count:
        raise SettingError("weights", f" must be {count} numbers, one for each source; got {len(weights)}")
    _check_numbers(weights)
    if low := [value for value in weights if value < 0]:
        raise SettingError("weights", f" must not be negative, got {low[0]:g}")
    total = sum(weights)  # `math.fsum` raises an error on overflow
    if not 0 < total < math.inf:
        raise SettingError("weights", " must not all be 0" if not total else " must have a finite sum")
    return [value / total for value in weights]


def _check_numbers(weights: Sequence[float]) -> None:
    if not weights:
        raise UserError("weights are missing: give one for each source")
    if wrong := [value for value in weights if not is_number(value)]:
        raise SettingError("weights", f" must be numbers, got {shown(wrong[0])}")
