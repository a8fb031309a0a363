"""Random numbers by name instead of by order: each sample draws the same whatever process or batch it is in."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_STREAMS = ("order", "initial", "step", "window", "kept", "eval", "forward")


def seed_of(seed: int, stream: str, *index: int) -> int:
    """Return the seed of one thing of a run.

    Args:
        seed: of the run.
        stream: what kind of thing.
        index: which one: rollout, prompt, sample, step.

    >>> seed_of(1, "step", 0, 5) == seed_of(1, "step", 0, 5)
    True
    >>> seed_of(1, "step", 0, 5) == seed_of(1, "initial", 0, 5)
    False
    """
    words = np.random.SeedSequence([seed, _STREAMS.index(stream), *index]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


class Shuffled:
    """The endless order of `count` things: every one once, then every one again in another order.

    Args:
        count: how many.
        seed: of the order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._turn: tuple[int, list[int]] = (-1, [])

    def at(self, position: int) -> int:
        """Return which one stands at a position, from 0 on."""
        turn, index = divmod(position, self.count)
        if self._turn[0] != turn:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "order", turn))
            self._turn = turn, torch.randperm(self.count, generator=generator).tolist()
        return self._turn[1][index]


def normal(shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> Tensor:
    """Return standard normal rows (len(seeds), *shape), float32; a row depends on its own seed alone."""
    generator = torch.Generator(device)
    rows = [torch.randn(*shape, generator=generator.manual_seed(seed), device=device) for seed in seeds]
    return torch.stack(rows)
