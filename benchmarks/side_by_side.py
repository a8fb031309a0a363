"""Runs of an experiment as processes, several side by side on each GPU."""

from __future__ import annotations

import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

LOOK = 1.0
"""Seconds between two looks at the processes."""
GRACE = 30.0
"""Seconds that processes have to end once they are told to: trainers end their step and save."""


class Run(Protocol):
    """One process of an experiment."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def log(self) -> Path:
        """What it prints."""

    @property
    def done(self) -> bool:
        """Whether it has run to its end."""


R = TypeVar("R", bound=Run)


def always(run: Any) -> bool:
    """Every run may begin."""
    return True


def started(words: Sequence[str], log: Path, gpu: str) -> subprocess.Popen[bytes]:
    """Start a process that sees one GPU; "" leaves what it sees as it is."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    if gpu:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with log.open("wb") as output:
        return subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment)


def run_all(
    runs: Sequence[R],
    gpus: Sequence[str],
    each: int,
    start: Callable[[R, str], subprocess.Popen[bytes]],
    *,
    ready: Callable[[R], bool] = always,
    until: float | None = None,
    tick: Callable[[], None] | None = None,
    go_on: bool = False,
) -> list[str]:
    """Run what is not done yet, and return the names of runs that failed.

    Args:
        runs: in the order in which they begin, as far as they may.
        gpus: numbers of GPUs; none is the CPU.
        each: runs at a time on one.
        start: starts one on a GPU, "" for the CPU.
        ready: whether what a run needs is there.
        until: time (`time.monotonic`) at which what still runs is ended, and counts neither as done nor as failed.
        tick: called after every look.
        go_on: whether others still begin after one has failed.
    """
    waiting = deque(run for run in runs if not run.done)
    places = deque(place for _ in range(each) for place in (gpus or [""]))
    running: list[tuple[R, str, subprocess.Popen[bytes]]] = []
    failed: list[str] = []
    try:
        while (waiting or running) and (until is None or time.monotonic() < until):
            while places and (go_on or not failed) and (found := next(filter(ready, waiting), None)) is not None:
                waiting.remove(found)
                place = places.popleft()
                running.append((found, place, start(found, place)))
            for run, place, process in [each for each in running if each[2].poll() is not None]:
                places.append(place)
                print(f"{run.name}: {'done' if run.done else f'failed, see {run.log}'}", flush=True)
                failed += [] if run.done else [run.name]
                running.remove((run, place, process))
            if not running and ((failed and not go_on) or not any(map(ready, waiting))):
                break  # nothing else can begin
            if tick is not None:
                tick()
            time.sleep(LOOK)
    finally:
        for *_, process in running:
            process.terminate()
        ends = time.monotonic() + GRACE
        for *_, process in running:
            try:
                process.wait(max(0.1, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    for run in [*(each[0] for each in running), *waiting]:
        print(f"{run.name}: not done", flush=True)
    return failed
