"""What a run costs: rows that went through the denoiser, and seconds in it and elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_OPEN = 4096
"""Times on a GPU that may wait to be read: of some meters nobody reads them."""


class Meter:
    """Counts and times. On a GPU the times are taken by events and read later, so that nothing waits for them.

    Args:
        device: where the work is done.
        backward: forward passes that a backward pass costs: 2, with recomputed activations 3.
    """

    def __init__(self, device: torch.device, backward: float = 2.0) -> None:
        self.device, self.backward = device, backward
        self.totals: dict[str, float] = {"forwards": 0.0, "trained": 0.0, "transformer_seconds": 0.0}
        self._open: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def rollout(self, rows: int) -> Iterator[None]:
        """Count and time forward passes of so many rows (the two of guidance are two)."""
        self.totals["forwards"] += rows
        with self.time("transformer_seconds"):
            yield

    @contextmanager
    def training(self, rows: int) -> Iterator[None]:
        """Count forward and backward passes of so many rows, and time the forward ones; `time` takes the others."""
        self.totals["trained"] += rows
        with self.time("transformer_seconds"):
            yield

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the seconds inside to the total of this name."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            yield
            self.totals[name] = self.totals.get(name, 0.0) + time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._open.append((name, begin, end))
        if len(self._open) >= _OPEN:
            self.read()

    @property
    def forward_equivalents(self) -> float:
        """Rows through the denoiser in units of one forward pass."""
        return self.totals["forwards"] + (1 + self.backward) * self.totals["trained"]

    def read(self) -> dict[str, float]:
        """Return all totals since the run began; waits for the device."""
        if self._open:
            torch.cuda.synchronize(self.device)
        for name, begin, end in self._open:
            self.totals[name] = self.totals.get(name, 0.0) + begin.elapsed_time(end) / 1000
        self._open = []
        return {**self.totals, "forward_equivalents": self.forward_equivalents}

    def load(self, totals: dict[str, float]) -> None:
        """Go on from the totals of a checkpoint."""
        self.totals = {name: value for name, value in totals.items() if name != "forward_equivalents"}
