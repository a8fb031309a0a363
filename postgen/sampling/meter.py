"""Cost of a run: number of rows through the denoiser, and seconds in the denoiser, decoder and rewards."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_OPEN = 4096
"""Maximum number of unread pairs of CUDA events. The meter then reads them itself; some meters have no reader."""


class Meter:
    """Counts passes and measures times. On a GPU, CUDA events are recorded and read later, without synchronisation.

    A pass is one row through the denoiser; guidance takes two passes.

    Args:
        device: device of the computations.
        backward: cost of a backward pass in forward passes: 2, or 3 with gradient checkpointing.
    """

    def __init__(self, device: torch.device, backward: float = 2.0) -> None:
        self.device, self.backward = device, backward
        self.totals: dict[str, float] = {"forwards": 0.0, "trained": 0.0, "transformer_seconds": 0.0}
        self._open: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def rollout(self, rows: int) -> Iterator[None]:
        """Count `rows` forward passes without gradients, and time the enclosed code as transformer time."""
        self.totals["forwards"] += rows
        with self.time("transformer_seconds"):
            yield

    @contextmanager
    def training(self, rows: int) -> Iterator[None]:
        """Count `rows` forward and backward passes, and time the enclosed forward passes.

        The caller times the backward passes with `time("transformer_seconds")`.
        """
        self.totals["trained"] += rows
        with self.time("transformer_seconds"):
            yield

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add the seconds of the enclosed code to the total `name`."""
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
        """Cost of all passes in units of one forward pass."""
        return self.totals["forwards"] + (1 + self.backward) * self.totals["trained"]

    def read(self) -> dict[str, float]:
        """Return all totals since the start of the run. Synchronises with the device."""
        if self._open:
            torch.cuda.synchronize(self.device)
        for name, begin, end in self._open:
            self.totals[name] = self.totals.get(name, 0.0) + begin.elapsed_time(end) / 1000
        self._open = []
        return {**self.totals, "forward_equivalents": self.forward_equivalents}

    def load(self, totals: dict[str, float]) -> None:
        """Set the totals to those of a checkpoint."""
        self.totals = {name: value for name, value in totals.items() if name != "forward_equivalents"}
