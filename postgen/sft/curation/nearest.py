"""Exact search for duplicates among vectors that arrive in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1024
"""Vectors that are compared at once; 100,000 kept vectors then take 400 MB for the products."""


class Duplicates:
    """Finds vectors that are near an earlier one, which was kept.

    The search compares with every kept vector, so it is exact; its time grows with the square of the number of
    vectors. 100,000 hashes of 256 bits take 100 MB of memory.

    Args:
        least: product of two vectors of length 1 from which on they are duplicates, the cosine similarity.
        device: device of the kept vectors.
    """

    def __init__(self, least: float, device: str = "cpu") -> None:
        # Rounding must not separate equal vectors.
        self.least, self.device = least - 1e-6, device
        self._kept: Tensor | None = None
        self._places: list[int] = []
        self._seen = 0

    def __len__(self) -> int:
        return len(self._places)

    def add(self, vectors: Tensor) -> list[int | None]:
        """Add vectors (N, D) of length 1, in order.

        Returns:
            For each vector the number of the kept vector that it duplicates (the nearest one), counted over all calls;
            None for a vector that is kept.
        """
        found: list[int | None] = []
        for block in vectors.to(self.device, torch.float32).split(_BLOCK):
            found += self._block(block)
        return found

    def _block(self, block: Tensor) -> list[int | None]:
        count = len(self)
        best = torch.full((len(block),), -2.0, device=self.device)
        near = torch.zeros(len(block), dtype=torch.long, device=self.device)
        if self._kept is not None and count:
            best, near = (block @ self._kept[:count].T).max(1)
        found: list[int | None] = [
            self._places[place] if value >= self.least else None
            for value, place in zip(best.tolist(), near.tolist(), strict=True)
        ]
        inside = (block @ block.T).tril(-1)  # later rows and the row itself do not count
        inside.diagonal().fill_(-2)
        # Only vectors that are kept themselves have duplicates, so the order matters; few rows have a near one.
        for row in (inside.amax(1) >= self.least).nonzero().flatten().tolist():
            if found[row] is None:
                earlier = [place for place in range(row) if found[place] is None]
                if earlier and float((same := inside[row, earlier]).max()) >= self.least:
                    found[row] = self._seen + earlier[int(same.argmax())]
        fresh = [row for row, place in enumerate(found) if place is None]
        self._keep(block[fresh], [self._seen + row for row in fresh])
        self._seen += len(block)
        return found

    def _keep(self, vectors: Tensor, places: list[int]) -> None:
        count, wanted = len(self), len(self) + len(vectors)
        if self._kept is None or wanted > len(self._kept):
            room = vectors.new_empty(max(_BLOCK, 2 * wanted), vectors.shape[1])
            if self._kept is not None:
                room[:count] = self._kept[:count]
            self._kept = room
        self._kept[count:wanted] = vectors
        self._places += places
