"""The segmented schedule: groups of frames in flight, each in its own part of the noise levels.

N steps are cut into K segments of S = N / K. Step indices are those of `postgen.sampling`: 0 is noise, N is clean. A
group of age a, a = 0 the newest and K - 1 the oldest, walks from index a S to (a + 1) S in one *shift*, which is S
calls of the network, all groups in flight together. Then the oldest is clean and leaves, the others grow one older,
and a new one begins. While the window fills, the groups stand in the segments of most noise (ages 0, 1, ...); while it
drains, in those of least. Segments are equal in number of steps, as the levels of the schedule have it, so the last
one has the widest range of noise. WorldWeaver, arXiv:2508.15720, draws such segments; sizes and what happens in
between are ours.

With K = 1 one chunk is made after the other. With K = N every call moves each group by one step and one leaves.
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
    """S calls of the network in which the groups in flight walk through one segment each."""

    number: int
    """From 0 on."""
    oldest: int
    """Number of the oldest group in flight; its neighbours follow."""
    ages: tuple[int, ...]
    """Age of each group in flight, oldest first: falling by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """N steps in K segments.

    Raises:
        UserError: fewer than 2 steps, fewer than 1 group, more groups than steps, or a number of steps that is no
            multiple of that of groups.
    """

    steps: int
    """N, of a frame from noise to clean."""
    groups: int
    """K, groups in flight at most."""

    def __post_init__(self) -> None:
        check_number("steps", self.steps, 2, whole=True)
        check_number("groups", self.groups, 1, self.steps, whole=True)
        if self.steps % self.groups:
            raise UserError(
                f"{self.steps} steps are not to be had in {self.groups} equal segments: take a multiple of"
                f" {self.groups}, or Segments.of, which raises the number"
            )

    @staticmethod
    def of(steps: int, groups: int) -> Segments:
        """Return K segments of at least `steps` steps: their number is raised to a multiple of K, with a warning.

        Raises:
            UserError: as `Segments`.
        """
        check_number("steps", steps, 2, whole=True)
        check_number("groups", groups, 1, steps, whole=True)
        return _raised(steps, groups * math.ceil(steps / groups), groups)

    @staticmethod
    def staggered(steps: int, ar_step: int) -> Segments:
        """Return segments of `ar_step` steps, diffusers' word for the lag of one group behind the next.

        Args:
            steps: N, raised to a multiple of `ar_step` with a warning.
            ar_step: S; 0 is synchronous: one group at a time, all its frames on one level.

        Raises:
            UserError: fewer than 2 steps, or an `ar_step` below 0 or above `steps`.
        """
        check_number("steps", steps, 2, whole=True)
        check_number("ar_step", ar_step, 0, steps, whole=True)
        groups = math.ceil(steps / ar_step) if ar_step else 1
        return _raised(steps, groups * (ar_step or steps), groups)

    @property
    def length(self) -> int:
        """S, steps of a segment: calls of the network for each finished group."""
        return self.steps // self.groups

    @property
    def bounds(self) -> tuple[int, ...]:
        """Step indices where segments begin and end, K + 1 from 0 to N."""
        return tuple(range(0, self.steps + 1, self.length))

    def calls(self, count: int) -> int:
        """Return the calls of the network for `count` groups: N + (G - 1) N / K."""
        check_number("count", count, 1, whole=True)
        return self.steps + (count - 1) * self.length

    def shifts(self, count: int | None) -> Iterator[Shift]:
        """Yield every shift of `count` groups, or without end."""
        number = 0
        while count is None or number < count + self.groups - 1:
            oldest = max(0, number - self.groups + 1)
            newest = number if count is None else min(number, count - 1)
            yield Shift(number=number, oldest=oldest, ages=tuple(number - g for g in range(oldest, newest + 1)))
            number += 1

    def walk(self, count: int) -> Iterator[dict[int, int]]:
        """Yield, for every call of the network, the number of each group in flight and the step index it stands at."""
        for shift in self.shifts(count):
            for step in range(self.length):
                indices = (age * self.length + step for age in shift.ages)
                yield dict(zip(range(shift.oldest, shift.oldest + len(shift.ages)), indices, strict=True))

    def filling(self, count: int) -> tuple[int, ...]:
        """Return the ages, oldest first, of `count` groups when the window has just begun to fill."""
        check_number("count", count, 1, self.groups, whole=True)
        return tuple(range(count - 1, -1, -1))

    def draining(self, count: int) -> tuple[int, ...]:
        """Return the ages, oldest first, of the last `count` groups."""
        check_number("count", count, 1, self.groups, whole=True)
        return tuple(range(self.groups - 1, self.groups - 1 - count, -1))

    def draw_ages(self, generator: torch.Generator, fill: float = 0.1, drain: float = 0.1) -> tuple[int, ...]:
        """Draw which groups stand in a training window: all K, or 1 to K - 1 of a window that fills or drains.

        Args:
            generator: on the CPU.
            fill: share of windows that fill.
            drain: share of windows that drain. With K = 1 there are neither.

        Raises:
            UserError: shares below 0, or above 1 together.
        """
        check_number("fill", fill, 0, 1)
        # 1 - 0.9 is below 0.1.
        check_number("drain", drain, 0, 1 if fill + drain <= 1 else 1 - fill)
        draw = float(torch.rand((), generator=generator))
        count = int(torch.randint(1, max(self.groups, 2), (), generator=generator))
        if self.groups == 1 or draw >= fill + drain:
            return self.filling(self.groups)
        return self.filling(count) if draw < fill else self.draining(count)

    def draw_phase(
        self, batch: int, ages: tuple[int, ...], generator: torch.Generator, independent: float = 0.25
    ) -> Tensor:
        """Draw how far groups are through their segments, (batch, groups) float64 in [0, 1).

        Args:
            batch: rows.
            ages: of the groups, as of `draw_ages`.
            generator: on the CPU.
            independent: share of rows whose groups have a phase each; those of the others share one, as in a rollout.

        Raises:
            UserError: a share outside 0 to 1.
        """
        check_number("independent", independent, 0, 1)
        phase = torch.rand(batch, len(ages), generator=generator, dtype=torch.float64)
        apart = torch.rand(batch, 1, generator=generator) < independent
        return torch.where(apart, phase, phase[:, :1])

    def levels(self, schedule: Schedule, ages: tuple[int, ...], phase: Tensor) -> Tensor:
        """Return the noise levels of groups, (batch, groups) float64.

        At the phases s / S of a rollout they are those of the schedule, bit by bit; between two of them, a straight
        line in sigma.

        Args:
            schedule: of N steps.
            ages: of the groups.
            phase: (batch, groups) in [0, 1]; 0 is the beginning of a segment, where there is most noise.

        Raises:
            UserError: a schedule of another number of steps, or phases of another shape or range.
        """
        self.check(schedule)
        if phase.dim() != 2 or phase.shape[1] != len(ages) or not bool(((phase >= 0) & (phase <= 1)).all()):
            raise UserError(
                f"phases of shape {tuple(phase.shape)}: give (batch, {len(ages)}) from 0 to 1, one for each group"
            )
        sigmas = schedule.sigmas
        within = (phase.to(sigmas) * self.length).clamp(0, self.length)
        # s / S * S need not be s to the last bit.
        within = torch.where((within - within.round()).abs() < 1e-9, within.round(), within)
        low = within.floor().long().clamp_max(self.length - 1)
        start = torch.tensor(ages, device=sigmas.device) * self.length + low
        return torch.lerp(sigmas[start], sigmas[start + 1], within - low)

    def check(self, schedule: Schedule) -> None:
        """Refuse a schedule of another number of steps.

        Raises:
            UserError: it has another number.
        """
        if schedule.steps != self.steps:
            raise UserError(f"a schedule of {schedule.steps} steps for segments of {self.steps}: make one of as many")


def _raised(asked: int, steps: int, groups: int) -> Segments:
    if steps != asked:
        warnings.warn(f"{asked} steps do not fill {groups} equal segments: {steps} are taken", stacklevel=3)
    return Segments(steps=steps, groups=groups)
