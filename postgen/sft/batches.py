"""The order of training batches. A batch depends on the seed and its position alone, so that a run can resume."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.sampling.seeds import seed_of

from .buckets import Bucket

_KEPT = 4
"""Number of passes whose order stays in memory, for each bucket."""
_GOLDEN = (5**0.5 - 1) / 2
T = TypeVar("T")


class Batches:
    """Batches of clips of one bucket each.

    Each bucket has an endless stream of its clips, in passes of random order. In a pass a clip occurs as often as its
    weight demands: exactly for whole ratios, otherwise once more or less, so that the mean over passes is right. The
    batches take from the streams in turn, spread evenly over the time, in proportion to the weight of the buckets.
    With equal weights, every clip occurs once in each pass, and no clip is left out, however few a bucket has.

    Position m of a batch is (step * accumulation + micro) * processes + rank: a run with another number of processes
    and the same product of accumulation and processes sees the same batches.

    Args:
        buckets: the bucket of each clip.
        batch_size: clips of a batch.
        seed: seed of the order.
        processes: number of processes.
        accumulation: micro-batches of a step in each process.
        weights: (N,) weight of each clip, at least 0; None: 1.
        image_share: share of the batches with images, from 0 to 1; None: their share of the weights.

    Raises:
        UserError: the weights are not N finite numbers of at least 0 with a sum above 0; or `image_share` needs images
            or videos that are missing.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        *,
        batch_size: int,
        seed: int,
        processes: int = 1,
        accumulation: int = 1,
        weights: Tensor | None = None,
        image_share: float | None = None,
    ) -> None:
        self.batch_size, self.seed, self.processes, self.accumulation = batch_size, seed, processes, accumulation
        mass = _checked_weights(weights, len(buckets))
        mass = _shared(mass, torch.tensor([bucket.num_frames == 1 for bucket in buckets]), image_share)
        self.clips = int((mass > 0).sum())
        """Number of clips that are used."""
        groups: dict[Bucket, list[int]] = {}
        for number, bucket in enumerate(buckets):
            if mass[number] > 0:
                groups.setdefault(bucket, []).append(number)
        self.buckets = sorted(groups)
        """Buckets with clips."""
        self._groups = [groups[bucket] for bucket in self.buckets]
        own = [mass[group] for group in self._groups]
        # Sums of the expected occurrences of the clips in a pass of their bucket, which has as many places as clips.
        self._sums = [_rounded((part / part.sum() * len(part)).cumsum(0)) for part in own]
        # Expected batches of each bucket in a cycle, which has as many batches as there are clips.
        self._rates = _rounded(torch.stack([part.sum() for part in own]) / mass.sum() * self.clips)
        first = torch.Generator().manual_seed(seed_of(seed, "data", 2))
        self._offsets, starts = torch.rand(2, len(own), generator=first, dtype=torch.float64)
        self._starts: list[float] = starts.tolist()
        self._passes: list[OrderedDict[int, list[int]]] = [OrderedDict() for _ in own]
        self._cycles: OrderedDict[int, list[tuple[int, int]]] = OrderedDict()

    @property
    def steps_per_epoch(self) -> float:
        """Number of steps in which as many clips are seen as there are."""
        return self.clips / (self.batch_size * self.processes * self.accumulation)

    def position(self, step: int, micro: int = 0, rank: int = 0) -> int:
        """Return the position of a batch, see the class."""
        return (step * self.accumulation + micro) * self.processes + rank

    def at(self, step: int, micro: int = 0, rank: int = 0) -> list[int]:
        """Return the numbers of the clips of a batch, all of one bucket.

        Args:
            step: number of the optimiser step, from 0.
            micro: number of the micro-batch in the step.
            rank: number of the process.
        """
        position = self.position(step, micro, rank)
        cycle = position // max(1, self.clips)
        while self._start(cycle) > position:
            cycle -= 1
        while self._start(cycle + 1) <= position:
            cycle += 1
        order = _kept(self._cycles, cycle, self._cycle)
        bucket, number = order[position - self._start(cycle)]
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        return [self._in_stream(bucket, place) for place in places]

    def _before(self, cycle: int) -> Tensor:
        """Return the number of batches of each bucket before a cycle."""
        before: Tensor = (self._rates * cycle + self._offsets).floor()  # the offsets are below 1
        return before.long()

    def _start(self, cycle: int) -> int:
        return int(self._before(cycle).sum())

    def _cycle(self, cycle: int) -> list[tuple[int, int]]:
        """Return (bucket, number of its batch) of each batch of a cycle."""
        starts, stops = self._before(cycle).tolist(), self._before(cycle + 1).tolist()
        chance = torch.Generator().manual_seed(seed_of(self.seed, "data", 3, cycle))
        found = []
        for bucket, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            count = stop - start
            times = (torch.arange(count) + torch.rand(count, generator=chance, dtype=torch.float64)) / max(1, count)
            found += [(time, bucket, start + number) for number, time in enumerate(times.tolist())]
        return [(bucket, number) for _, bucket, number in sorted(found)]

    def _in_stream(self, bucket: int, place: int) -> int:
        turn, index = divmod(place, len(self._groups[bucket]))
        return _kept(self._passes[bucket], turn, lambda number: self._pass(bucket, number))[index]

    def _pass(self, bucket: int, turn: int) -> list[int]:
        """Return the clips of a pass of a bucket in their order (systematic sampling)."""
        group, count = self._groups[bucket], len(self._groups[bucket])
        # The golden ratio spreads the starts evenly, so that the mean over some passes is nearly exact.
        start = (self._starts[bucket] + turn * _GOLDEN) % 1.0
        points = torch.arange(count, dtype=torch.float64) + start
        chosen = torch.searchsorted(self._sums[bucket], points, right=True).clamp(max=count - 1)
        chance = torch.Generator().manual_seed(seed_of(self.seed, "data", 4, bucket, turn))
        return [group[number] for number in chosen[torch.randperm(count, generator=chance)].tolist()]


def _rounded(values: Tensor) -> Tensor:
    """Remove the rounding errors of whole numbers, so that equal weights give each clip exactly once."""
    near = values.round()
    return torch.where((values - near).abs() < 1e-6, near, values)


def _checked_weights(weights: Tensor | None, count: int) -> Tensor:
    found = torch.ones(count, dtype=torch.float64) if weights is None else weights.detach().cpu().double()
    if tuple(found.shape) != (count,):
        raise UserError(f"weights have the shape {tuple(found.shape)}, but there are {count} clips: give one for each")
    if not (found.isfinite().all() and (found >= 0).all() and found.sum() > 0):
        raise UserError("weights must be finite numbers of at least 0, with a sum above 0")
    return found


def _shared(mass: Tensor, images: Tensor, share: float | None) -> Tensor:
    """Return the weights with the configured share of images."""
    if share is None:
        return mass
    parts = [(mass * images).sum(), (mass * ~images).sum()]
    for part, wanted, what in zip(parts, (share, 1 - share), ("images", "videos"), strict=True):
        if wanted > 0 and not part > 0:
            raise UserError(f"image_share is {share:g}, but the data set has no {what}: add some, or leave it out")
    scales = [
        wanted / part if wanted > 0 else part * 0 for part, wanted in zip(parts, (share, 1 - share), strict=True)
    ]
    return mass * torch.where(images, scales[0], scales[1])


def _kept(known: OrderedDict[int, T], number: int, make: Callable[[int], T]) -> T:
    """Return an entry, made if it is not among the last used ones."""
    if number not in known:
        known[number] = make(number)
        if len(known) > _KEPT:
            known.popitem(last=False)
    known.move_to_end(number)
    return known[number]
