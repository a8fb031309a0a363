"""A fast deterministic solver for the steps that are not trained: DPM-Solver++ (2M), arXiv:2211.01095, Algorithm 2."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .schedule import Levels
from .transition import wide

Solver = Literal["euler", "dpm++"]


class Multistep:
    """Second order from the second step on; the step to 0 is of first order, as in diffusers.

    One object serves one run of steps: its history starts empty. Rows may join behind the others; theirs does too.
    """

    def __init__(self) -> None:
        self._before: tuple[Tensor, Tensor] | None = None

    def step(self, x: Tensor, clean: Tensor, levels: Levels) -> Tensor:
        """Return the latents after a step.

        Args:
            x: (B, ...) latents before it.
            clean: what the network thinks the clean latents are.
            levels: where the step begins and ends.
        """
        (a, b), (a_after, b_after) = levels.mix()
        signal = (a / b).log()
        estimate = clean
        if self._before is not None and bool((b_after > 0).all()):
            earlier, signal_before = self._before
            known = len(earlier)
            # Whoever joins has nothing to differ from: a step of first order.
            earlier = torch.cat([earlier, clean[known:]])
            signal_before = torch.cat([signal_before, signal[known:] - 1])
            ratio = (signal - signal_before) / ((a_after / b_after).log() - signal)
            estimate = clean + wide(0.5 / ratio, clean) * (clean - earlier)
        self._before = clean, signal
        shrink = b_after / b
        return wide(shrink, x) * x + wide(a_after - a * shrink, x) * estimate


def coarser(start: int, stop: int, fraction: float) -> list[int]:
    """Return step indices from `start` to `stop`, about `fraction` of the steps between them, at least one.

    >>> coarser(4, 12, 0.5)
    [4, 6, 8, 10, 12]
    """
    count = max(1, round((stop - start) * fraction))
    return [start + round(number * (stop - start) / count) for number in range(count + 1)]
