"""Observations of the device in a batch of clips: plain arrays without torch, so another process can receive them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from postgen.world.check.pieces import Piece, Spot, pieces, spots
from postgen.world.check.tracks import Track, follow


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """Observations in B clips of F pictures: N blobs with C values each.

    `rows_NC`, float64: the blobs, picture after picture; the columns are `pieces.COLUMNS`. `count_BF`: number of blobs
    per picture. `spots_MSC`: spots of each picture; the columns are `ground.SPOT_COLUMNS`. `height` and `width`: size
    of all pictures. `likeness`: similarity of each clip to the world, in [0,1].
    """

    rows_NC: NDArray[np.float64]
    count_BF: NDArray[np.int64]
    spots_MSC: NDArray[np.float64]
    height: int
    width: int
    likeness: list[float]
    #: Camera distance of each clip along the requested path, relative to the usual distance; None if no move is
    #: requested.
    film: list[float | None]

    def __len__(self) -> int:
        return len(self.likeness)

    def part(self, low: int, high: int) -> Sight:
        """Return the observations of clips low to high - 1."""
        start, stop = (int(self.count_BF[:clip].sum()) for clip in (low, high))
        rows, likeness = self.rows_NC[start:stop], self.likeness[low:high]
        frames = self.count_BF.shape[1]
        return replace(
            self,
            rows_NC=rows,
            count_BF=self.count_BF[low:high],
            spots_MSC=self.spots_MSC[low * frames : high * frames],
            likeness=likeness,
            film=self.film[low:high],
        )

    def pieces(self) -> Iterator[list[dict[int, list[Piece]]]]:
        """Yield the coloured pieces of each frame, clip by clip."""
        rows = iter(self.rows_NC.tolist())
        for counts in self.count_BF.tolist():
            yield [pieces(list(itertools.islice(rows, count)), self.height, self.width) for count in counts]

    def tracks(self) -> Iterator[list[Track]]:
        """Yield the bodies of each clip."""
        return map(follow, self.pieces())

    def spots(self) -> Iterator[list[list[Spot]]]:
        """Yield the spots of each frame, clip by clip."""
        step = self.count_BF.shape[1]
        table = self.spots_MSC.tolist()
        for low in range(0, len(table), step):
            yield [spots([row for row in rows if row[0] > 0]) for rows in table[low : low + step]]
