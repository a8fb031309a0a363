"""Measure whether the memory of a training run grows with its length.

    python -m benchmarks.faults_growth

The benchmark trains tiny models on the CPU with the real trainers, for some thousand very cheap steps, each trainer in
its own process. Everything that may grow is on: a log line per step, evaluations, checkpoints, exports with model
cards, TensorBoard. Every 50 steps it frees unused memory (`gc.collect`, glibc's `malloc_trim`) and reads the resident
set. It leaves out the first steps, in which caches fill (the log keeps 1,000 lines). The result is the slope of the
least-squares line through the other readings. Run it on Linux from the root of a checkout, because it uses the tiny
models of the tests.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

EVERY = 50
"""Number of steps between two readings."""
STEPS, WARM_UP = 6000, 2000
"""Number of steps of a measured run, and how many of the first ones are left out."""
TOTAL = 2**20


def resident_mb() -> float:
    """Free unused memory, and return the resident set of this process in MB (2**20 bytes)."""
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / TOTAL


def slope(points: Sequence[tuple[int, float]], warm_up: int) -> float:
    """Return the slope of the least squares line through (step, MB) after the warm-up, in MB per 1,000 steps.

    >>> round(slope([(0, 50.0), (1000, 10.0), (2000, 10.5), (3000, 11.0)], 1000), 6)
    0.5
    """
    steps, megabytes = zip(*[point for point in points if point[0] >= warm_up], strict=True)
    return float(np.polyfit(steps, megabytes, 1)[0]) * 1000


@dataclass
class Readings(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Callback that reads the memory every `every` steps; `points` holds (step, MB)."""

    every: int = EVERY
    points: list[tuple[int, float]] = field(default_factory=list)

    def on_step_end(self, args: Any, state: Any, control: Any, **extra: Any) -> None:
        """Read the memory if the step is a multiple of `every`."""
        if state.global_step % self.every == 0:
            self.points.append((state.global_step, round(resident_mb(), 3)))


def _base(folder: Path, readings: TrainerCallback, **settings: Any) -> Any:
    from tests.training.tiny import TinyConfig, TinyTrainer

    class Bounded(TinyTrainer):
        """The tiny trainer without the list in which the tests record every step, since this list grows."""

        def on_optimizer_step(self) -> None:
            self.seen.clear()

    return Bounded(TinyConfig(output_dir=str(folder), ema_decay=0.9, **settings), [readings])


def _group(kind: str) -> Callable[..., Any]:
    def made(folder: Path, readings: TrainerCallback, **settings: Any) -> Any:
        from postgen.grpo.nft import DiffusionNFTTrainer
        from postgen.grpo.trainer import DanceGRPOTrainer
        from tests.grpo.toy import ROWS, grpo

        return grpo(
            folder,
            kind={"dancegrpo": DanceGRPOTrainer, "diffusion_nft": DiffusionNFTTrainer}[kind],
            eval_dataset=ROWS[:2],
            callbacks=[readings],
            num_generations=2,
            per_device_train_batch_size=2,
            num_inference_steps=2,
            eval_grid=1,
            **settings,
        )

    return made


TRAINERS: Mapping[str, Callable[..., Any]] = {
    "trainer": _base,
    "dancegrpo": _group("dancegrpo"),
    "diffusion_nft": _group("diffusion_nft"),
}
"""Function that makes a trainer, by name."""


def measured(
    name: str, steps: int, *, every: int = EVERY, callback: type[Readings] = Readings, **more: Any
) -> Readings:
    """Train the trainer `name` in this process, with more settings; return the readings."""
    readings = callback(every=every)
    settings = {"max_steps": steps, "logging_steps": 1, "eval_steps": 100, "save_steps": 500, "save_seconds": 10.0}
    settings |= {"report_to": ["tensorboard"], "disable_tqdm": True, "device": "cpu", **more}
    with tempfile.TemporaryDirectory() as folder:
        TRAINERS[name](Path(folder, "run"), readings, **settings).train()
    return readings


def by_trainer() -> list[dict[str, Any]]:
    """Measure each trainer in its own process; return the slope, the settings and the readings of each."""
    rows = []
    for name in TRAINERS:
        command = [sys.executable, "-m", "benchmarks.faults_growth", "--one", name]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        points = json.loads(told.splitlines()[-1])
        found = slope(points, WARM_UP)
        print(f"{name}: {found:.4f} MB per 1,000 steps ({points[0][1]:.1f} MB, at the end {points[-1][1]:.1f} MB)")
        row = {"trainer": name, "mb_per_1000_steps": found, "steps": STEPS, "warm_up": WARM_UP}
        rows.append({**row, "mb": [point for point in points if point[0] % 500 == 0]})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure all trainers, or print the readings of one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults_growth", description=__doc__.splitlines()[0])
    parser.add_argument("--one", choices=list(TRAINERS), help="train only this one, here, and print its readings")
    name = parser.parse_args(argv).one
    if name is None:
        by_trainer()
    else:
        print(json.dumps(measured(name, STEPS).points))
    return 0


if __name__ == "__main__":
    sys.exit(main())
