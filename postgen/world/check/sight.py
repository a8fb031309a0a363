"""What the device saw in a batch of clips: plain arrays, no torch, so that they can go to another process."""

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
    """What the device saw in B clips of F pictures: N blobs, with C values each.

    `rows_NC` float64, the blobs of one picture after those of another, columns as `pieces.COLUMNS`; `count_BF` of each
    picture; `height` and `width` of all pictures; `likeness` how much each clip looks like the world, in [0,1].
    """

    rows_NC: NDArray[np.float64]
    count_BF: NDArray[np.int64]
    spots_MSC: NDArray[np.float64]
    height: int
    width: int
    likeness: list[float]
    #: How far the camera of each clip goes along the path that was asked for, in parts of the usual way; or None.
    film: list[float | None]

    def __len__(self) -> int:
        return len(self.likeness)

    def part(self, low: int, high: int) -> Sight:
        """Return clips low to high - 1."""
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
        """Yield the coloured pieces of each frame of each clip."""
        rows = iter(self.rows_NC.tolist())
        for counts in self.count_BF.tolist():
            yield [pieces(list(itertools.islice(rows, count)), self.height, self.width) for count in counts]

    def tracks(self) -> Iterator[list[Track]]:
        """Yield the bodies of each clip."""
        return map(follow, self.pieces())

    def spots(self) -> Iterator[list[list[Spot]]]:
        """Yield the spots of each frame of each clip."""
        step = self.count_BF.shape[1]
        table = self.spots_MSC.tolist()
        for low in range(0, len(table), step):
            yield [spots([row for row in rows if row[0] > 0]) for rows in table[low : low + step]]
