"""Deterministic solvers: DPM-Solver++ (2M), arXiv:2211.01095, Algorithm 2, and coarser grids of steps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .schedule import Levels
from .transition import wide

Solver = Literal["euler", "dpm++"]
"""Of deterministic steps: Euler's (for models with alpha-bar DDIM's), or DPM-Solver++ (2M)."""


class Multistep:
    """DPM-Solver++ (2M): second order from the second step on; the step to 0 is of first order, as in diffusers.

    One object serves one run of steps and starts without a history. Rows may be added behind the others on the way:
    their first step is of first order. With noise levels per frame every frame has an order of its own.
    """

    def __init__(self) -> None:
        self._before: tuple[Tensor, Tensor] | None = None

    def step(self, x: Tensor, clean: Tensor, levels: Levels) -> Tensor:
        """Return the latents after a step.

        Args:
            x: (B, ...) latents before it.
            clean: what the network thinks the clean latents are.
            levels: where the step begins and ends, (B,) or (B, T).
        """
        (a, b), (a_after, b_after) = levels.mix()
        signal, axis = (a / b).log(), levels.frame_axis
        estimate = clean
        if self._before is not None and bool((b_after > 0).any()):
            earlier, signal_before = self._before
            known = len(earlier)
            # New rows have nothing to differ from: a step of first order.
            earlier = torch.cat([earlier, clean[known:]])
            signal_before = torch.cat([signal_before, signal[known:] - 1])
            ratio = (signal - signal_before) / ((a_after / b_after).log() - signal)
            factor = 0.5 / ratio
            # First order too for levels that reach 0, and for frames that have not moved since the last step.
            factor = torch.where((b_after > 0) & factor.isfinite(), factor, 0)
            estimate = clean + wide(factor, clean, axis) * (clean - earlier)
        self._before = clean, signal
        shrink = torch.where(b > 0, b_after / b, 0)
        return wide(shrink, x, axis) * x + wide(a_after - a * shrink, x, axis) * estimate


def coarser(start: int, stop: int, fraction: float) -> list[int]:
    """Return step indices from `start` to `stop`, about `fraction` of the steps between them, at least one.

    >>> coarser(4, 12, 0.5)
    [4, 6, 8, 10, 12]
    """
    count = max(1, round((stop - start) * fraction))
    return [start + round(number * (stop - start) / count) for number in range(count + 1)]
