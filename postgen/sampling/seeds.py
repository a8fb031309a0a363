"""Random numbers that depend on names instead of order: a sample draws the same numbers in any process or batch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_STREAMS = ("order", "initial", "step", "window", "kept", "eval", "forward", "shuffle", "data")


def seed_of(seed: int, stream: str, *index: int) -> int:
    """Return the seed for one purpose in a run, in [0, 2^63).

    Args:
        seed: seed of the run.
        stream: purpose of the random numbers, one of `_STREAMS`.
        index: numbers that identify the draw, such as rollout, prompt, sample and step.

    >>> seed_of(1, "step", 0, 5) == seed_of(1, "step", 0, 5)
    True
    >>> seed_of(1, "step", 0, 5) == seed_of(1, "initial", 0, 5)
    False
    """
    words = np.random.SeedSequence([seed, _STREAMS.index(stream), *index]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


class Shuffled:
    """An endless random order of `count` items: all items once, then all items once more in another order, and so on.

    Args:
        count: number of items.
        seed: seed of the order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._turn: tuple[int, list[int]] = (-1, [])

    def at(self, position: int) -> int:
        """Return the item, 0 to count - 1, at a position, counted from 0."""
        turn, index = divmod(position, self.count)
        if self._turn[0] != turn:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "order", turn))
            self._turn = turn, torch.randperm(self.count, generator=generator).tolist()
        return self._turn[1][index]


def normal(shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> Tensor:
    """Return standard normal noise (len(seeds), *shape), float32; each row depends on its own seed only."""
    generator = torch.Generator(device)
    rows = [torch.randn(*shape, generator=generator.manual_seed(seed), device=device) for seed in seeds]
    return torch.stack(rows)
