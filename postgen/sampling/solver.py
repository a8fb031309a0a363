"""Deterministic solvers: DPM-Solver++ (2M) (arXiv:2211.01095, Algorithm 2), and coarser grids of steps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .schedule import Levels
from .transition import wide

Solver = Literal["euler", "dpm++"]
"""Solver of deterministic steps: "euler" (DDIM for models with alpha-bars), or "dpm++", DPM-Solver++ (2M)."""


class Multistep:
    """DPM-Solver++ (2M): second order from the second step on, first order for the step to 0, as in diffusers.

    An object keeps the history of one sequence of steps. Rows may be appended during the sequence; the first step of a
    new row is of first order. With noise levels per frame, each frame has its own order.
    """

    def __init__(self) -> None:
        self._before: tuple[Tensor, Tensor] | None = None

    def step(self, x: Tensor, clean: Tensor, levels: Levels) -> Tensor:
        """Return the latents after a step.

        Args:
            x: (B, ...) latents before the step.
            clean: (B, ...) the network's estimate of the clean latents.
            levels: noise levels before and after the step, (B,) or (B, T).
        """
        (a, b), (a_after, b_after) = levels.mix()
        signal, axis = (a / b).log(), levels.frame_axis
        estimate = clean
        if self._before is not None and bool((b_after > 0).any()):
            earlier, signal_before = self._before
            known = len(earlier)
            # New rows have no history: with `earlier` = `clean` their step is of first order.
            earlier = torch.cat([earlier, clean[known:]])
            signal_before = torch.cat([signal_before, signal[known:] - 1])
            ratio = (signal - signal_before) / ((a_after / b_after).log() - signal)
            factor = 0.5 / ratio
            # Steps to level 0, and frames whose level did not change in the last step, are of first order as well.
            factor = torch.where((b_after > 0) & factor.isfinite(), factor, 0)
            estimate = clean + wide(factor, clean, axis) * (clean - earlier)
        self._before = clean, signal
        shrink = torch.where(b > 0, b_after / b, 0)
        return wide(shrink, x, axis) * x + wide(a_after - a * shrink, x, axis) * estimate


def coarser(start: int, stop: int, fraction: float) -> list[int]:
    """Return step indices from `start` to `stop` that take about `fraction` of the steps between them, at least one.

    >>> coarser(4, 12, 0.5)
    [4, 6, 8, 10, 12]
    """
    count = max(1, round((stop - start) * fraction))
    return [start + round(number * (stop - start) / count) for number in range(count + 1)]
