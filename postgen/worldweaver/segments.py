"""The segmented schedule: each group of frames in flight is in its own segment of the noise levels.

N steps are divided into K segments of S = N / K steps. Step indices are those of `postgen.sampling`: 0 is noise, N is
clean. A group has an age a: 0 for the newest group, K - 1 for the oldest. In one *shift*, which is S forward passes of
all groups in flight together, a group of age a goes from step index a S to (a + 1) S. After the shift the oldest group
is clean and leaves, the other groups become one older, and a new group begins. While the window fills, its groups are
in the segments with the most noise (ages 0, 1, ...). While it drains, its groups are in the segments with the least
noise. All segments have the same number of steps of the schedule, so the last segment covers the widest range of noise
levels. WorldWeaver, arXiv:2508.15720, has such segments; the segment sizes and the shifts are our design.

With K = 1 the groups are generated one after the other. With K = N every forward pass moves each group by one step
and completes one group.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import UserError, check_number
from postgen.sampling.schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Shift:
    """S forward passes in which each group in flight goes through one segment."""

    number: int
    """Number of the shift, from 0 on."""
    oldest: int
    """Number of the oldest group in flight; the other groups in flight have the numbers that follow."""
    ages: tuple[int, ...]
    """Age of each group in flight, oldest first; each age is one less than the age before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """N steps divided into K segments of equal length.

    Raises:
        UserError: fewer than 2 steps, fewer than 1 group, more groups than steps, or steps that are not a multiple of
            groups.
    """

    steps: int
    """N, number of steps of a frame from noise to clean."""
    groups: int
    """K, largest number of groups in flight."""

    def __post_init__(self) -> None:
        check_number("steps", self.steps, 2, whole=True)
        check_number("groups", self.groups, 1, self.steps, whole=True)
        if self.steps % self.groups:
            raise UserError(
                f"{self.steps} steps cannot be divided into {self.groups} equal segments: give a multiple of"
                f" {self.groups}, or use Segments.of, which rounds the number of steps up"
            )

    @staticmethod
    def of(steps: int, groups: int) -> Segments:
        """Return K segments with at least `steps` steps. The number is rounded up to a multiple of K, with a warning.

        Raises:
            UserError: as in `Segments`.
        """
        check_number("steps", steps, 2, whole=True)
        check_number("groups", groups, 1, steps, whole=True)
        return _raised(steps, groups * math.ceil(steps / groups), groups)

    @staticmethod
    def staggered(steps: int, ar_step: int) -> Segments:
        """Return segments of `ar_step` steps. This is the name in diffusers for the lag between consecutive groups.

        Args:
            steps: N, rounded up to a multiple of `ar_step`, with a warning.
            ar_step: S; 0 is synchronous mode: one group at a time with all frames at the same noise level.

        Raises:
            UserError: fewer than 2 steps, or an `ar_step` below 0 or above `steps`.
        """
        check_number("steps", steps, 2, whole=True)
        check_number("ar_step", ar_step, 0, steps, whole=True)
        groups = math.ceil(steps / ar_step) if ar_step else 1
        return _raised(steps, groups * (ar_step or steps), groups)

    @property
    def length(self) -> int:
        """S, steps of a segment. This is also the number of forward passes per finished group."""
        return self.steps // self.groups

    @property
    def bounds(self) -> tuple[int, ...]:
        """Step indices at which segments begin and end: K + 1 indices from 0 to N."""
        return tuple(range(0, self.steps + 1, self.length))

    def calls(self, count: int) -> int:
        """Return the number of forward passes for G = `count` groups: N + (G - 1) N / K."""
        check_number("count", count, 1, whole=True)
        return self.steps + (count - 1) * self.length

    def shifts(self, count: int | None) -> Iterator[Shift]:
        """Yield every shift for `count` groups; None: yield shifts without end."""
        number = 0
        while count is None or number < count + self.groups - 1:
            oldest = max(0, number - self.groups + 1)
            newest = number if count is None else min(number, count - 1)
            yield Shift(number=number, oldest=oldest, ages=tuple(number - g for g in range(oldest, newest + 1)))
            number += 1

    def walk(self, count: int) -> Iterator[dict[int, int]]:
        """Yield, for every forward pass, a dictionary from the number of each group in flight to its step index."""
        for shift in self.shifts(count):
            for step in range(self.length):
                indices = (age * self.length + step for age in shift.ages)
                yield dict(zip(range(shift.oldest, shift.oldest + len(shift.ages)), indices, strict=True))

    def filling(self, count: int) -> tuple[int, ...]:
        """Return the ages of the first `count` groups, oldest first, while the window fills."""
        check_number("count", count, 1, self.groups, whole=True)
        return tuple(range(count - 1, -1, -1))

    def draining(self, count: int) -> tuple[int, ...]:
        """Return the ages of the last `count` groups, oldest first, while the window drains: K - 1, K - 2, ..."""
        check_number("count", count, 1, self.groups, whole=True)
        return tuple(range(self.groups - 1, self.groups - 1 - count, -1))

    def draw_ages(self, generator: torch.Generator, fill: float = 0.1, drain: float = 0.1) -> tuple[int, ...]:
        """Draw the ages of the groups in a training window: all K, or 1 to K - 1 for a window that fills or drains.

        Args:
            generator: CPU generator.
            fill: share of windows that fill.
            drain: share of windows that drain. With K = 1 every window has its single group.

        Raises:
            UserError: shares below 0, or above 1 together.
        """
        check_number("fill", fill, 0, 1)
        # The sum is compared and not 1 - fill, because 1 - 0.9 is slightly below 0.1 in floating point.
        check_number("drain", drain, 0, 1 if fill + drain <= 1 else 1 - fill)
        draw = float(torch.rand((), generator=generator))
        count = int(torch.randint(1, max(self.groups, 2), (), generator=generator))
        if self.groups == 1 or draw >= fill + drain:
            return self.filling(self.groups)
        return self.filling(count) if draw < fill else self.draining(count)

    def draw_phase(
        self, batch: int, ages: tuple[int, ...], generator: torch.Generator, independent: float = 0.25
    ) -> Tensor:
        """Draw the position of each group within its segment, (batch, groups) float64 in [0, 1).

        Args:
            batch: number of rows.
            ages: ages of the groups, from `draw_ages`.
            generator: CPU generator.
            independent: share of rows in which each group has its own phase. In other rows all groups have the same
                phase, as in a rollout.

        Raises:
            UserError: a share outside 0 to 1.
        """
        check_number("independent", independent, 0, 1)
        phase = torch.rand(batch, len(ages), generator=generator, dtype=torch.float64)
        apart = torch.rand(batch, 1, generator=generator) < independent
        return torch.where(apart, phase, phase[:, :1])

    def levels(self, schedule: Schedule, ages: tuple[int, ...], phase: Tensor) -> Tensor:
        """Return the noise levels of groups, (batch, groups) float64.

        At the phases s / S of a rollout the levels equal those of the schedule, bit by bit. Between two of these
        phases sigma is interpolated linearly.

        Args:
            schedule: noise levels of N steps.
            ages: ages of the groups.
            phase: (batch, groups) in [0, 1]; 0 is the beginning of a segment, which has the most noise.

        Raises:
            UserError: a schedule with another number of steps, or phases of a wrong shape or range.
        """
        self.check(schedule)
        if phase.dim() != 2 or phase.shape[1] != len(ages) or not bool(((phase >= 0) & (phase <= 1)).all()):
            raise UserError(
                f"phase has shape {tuple(phase.shape)}: give (batch, {len(ages)}), one value from 0 to 1 per group"
            )
        sigmas = schedule.sigmas
        within = (phase.to(sigmas) * self.length).clamp(0, self.length)
        # s / S * S may differ from s in the last bit.
        within = torch.where((within - within.round()).abs() < 1e-9, within.round(), within)
        low = within.floor().long().clamp_max(self.length - 1)
        start = torch.tensor(ages, device=sigmas.device) * self.length + low
        return torch.lerp(sigmas[start], sigmas[start + 1], within - low)

    def check(self, schedule: Schedule) -> None:
        """Check that a schedule has N steps.

        Raises:
            UserError: the schedule has another number of steps.
        """
        if schedule.steps != self.steps:
            raise UserError(
                f"the schedule has {schedule.steps} steps and the segments have {self.steps}: give a schedule with"
                f" {self.steps} steps"
            )


def _raised(asked: int, steps: int, groups: int) -> Segments:
    if steps != asked:
        warnings.warn(
            f"{asked} steps cannot be divided into {groups} equal segments: {steps} steps are used", stacklevel=3
        )
    return Segments(steps=steps, groups=groups)
