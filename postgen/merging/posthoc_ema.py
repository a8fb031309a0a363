"""Post-hoc EMA: averages with a power-function profile, chosen after the training (arXiv:2312.02696).

The average at step T with exponent gamma weights the weights of step t by the profile
p(t) = (gamma + 1) t^gamma / T^(gamma + 1), 0 <= t <= T. Its relative width sigma_rel is the standard deviation of the
profile divided by T. A run stores snapshots of one or two averages; a linear combination of the snapshots whose
profiles come closest to a wanted profile (least squares) is an average that the run did not keep. The module is
light to import.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from postgen.errors import SettingError, UserError, is_number, shown

WIDEST = 12**-0.5
"""Upper limit of the relative width: that of the plain mean of all steps, gamma = 0."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Profile of an average: its exponent, and the step at which it was stored."""

    gamma: float
    step: float

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: gamma is negative, or the step is not above 0.
        """
        if not is_number(self.gamma) or self.gamma < 0:
            raise SettingError("gamma", f" must be at least 0, got {shown(self.gamma)}")
        if not is_number(self.step) or self.step <= 0:
            raise SettingError("step", f" must be above 0, got {shown(self.step)}")


def sigma_rel_of(gamma: float) -> float:
    """Return the relative width of a profile.

    >>> round(sigma_rel_of(6.94), 4), round(sigma_rel_of(16.97), 4)
    (0.1, 0.05)
    """
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel: float) -> float:
    """Return the exponent of the profile with a relative width.

    Args:
        sigma_rel: relative width, above 0 and at most `WIDEST`.

    Raises:
        UserError: the width is outside this range.

    >>> round(gamma_of(0.1), 2), round(gamma_of(0.05), 2)
    (6.94, 16.97)
    """
    if not is_number(sigma_rel) or not 1e-4 <= sigma_rel <= WIDEST + 1e-12:
        raise SettingError("sigma_rel", f" must be from 0.0001 to {WIDEST:.4f}, got {shown(sigma_rel)}")
    low, high = 0.0, 2 / sigma_rel  # the width falls with gamma, and is below 1 / (gamma + 2)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sigma_rel_of(middle) > sigma_rel else (low, middle)
    return (low + high) / 2


def beta(step: int, gamma: float) -> float:
    """Return the decay of the average at a step: average = beta * average + (1 - beta) * weights.

    Args:
        step: number of the optimiser step, from 1; the decay of step 1 is 0.
        gamma: exponent of the profile.
    """
    return float((1 - 1 / step) ** (gamma + 1))


def inner(a: Profile, b: Profile) -> float:
    """Return the integral of the product of two profiles."""
    first, second = (a, b) if a.step <= b.step else (b, a)
    # The powers of large steps would overflow, so only the ratio of the steps is raised to a power.
    scale = (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1)
    return float(scale * (first.step / second.step) ** second.gamma / second.step)


def solve(stored: Sequence[Profile], wanted: Profile) -> list[float]:
    """Return the weights of stored averages whose combination has the profile closest to a wanted one.

    The distance of two profiles is the integral of their squared difference. The weights have the sum 1.

    Args:
        stored: profiles of the stored averages.
        wanted: the wanted profile.

    Returns:
        One weight for each stored average; some may be negative.

    Raises:
        UserError: nothing is stored, two stored profiles are equal, or all are from steps after the wanted one.
    """
    import torch

    if not stored:
        raise UserError("no average is stored: give at least one")
    if len(set(stored)) < len(stored):
        raise UserError("two of the stored averages have the same gamma and step: give each once")
    if all(profile.step > wanted.step for profile in stored):
        raise UserError(f"no average was stored up to step {wanted.step:g}, the first is of step {stored[0].step:g}")
    # The condition "sum 1" makes the combination a mean of weights; it is one more equation (Lagrange).
    count = len(stored)
    system = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    right = torch.zeros(count + 1, dtype=torch.float64)
    scale = wanted.step  # the equations do not depend on the unit of time
    for i, one in enumerate(stored):
        for j, other in enumerate(stored):
            system[i, j] = inner(one, other) * scale
        right[i] = inner(one, wanted) * scale
    system[count, :count] = system[:count, count] = right[count] = 1
    found = torch.linalg.lstsq(system, right, driver="gelsd").solution[:count].tolist()
    return [float(value) for value in found]


def power_weights(steps: Sequence[int], gamma: float) -> list[float]:
    """Return the weights of plain checkpoints that approximate the average with a power-function profile.

    Each checkpoint stands for the steps since the one before it, the first for all steps before it.

    Args:
        steps: steps of the checkpoints, increasing and above 0.
        gamma: exponent of the profile.

    Returns:
        Weights >= 0 with sum 1.

    Raises:
        UserError: there are no steps, or they do not increase.

    >>> power_weights([10, 20, 40], 0)
    [0.25, 0.25, 0.5]
    """
    if not steps or steps[0] <= 0 or any(late <= early for early, late in itertools.pairwise(steps)):
        raise UserError(f"the steps of the checkpoints must be above 0 and increase, got {shown(list(steps))}")
    masses = [(step / steps[-1]) ** (gamma + 1) for step in steps]
    return [late - early for early, late in itertools.pairwise([0.0, *masses])]
