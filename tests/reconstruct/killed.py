"""Runs of the toy user that are killed with signal 9 at named points: `python -m tests.reconstruct.killed FOLDER`.

One process imports everything and collects the records; each run is a fork of this process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from postgen.reconstruct import Records, block_run, reconstruct
from postgen.training import checkpoint
from tests.reconstruct.toy import pipeline, settings, tasks

POINTS = {
    "before the first checkpoint": ("blocks.0", 3),
    "while a checkpoint is written": ("blocks.0", 10),
    "in the second block": ("blocks.1", 8),
    "before the result is whole": ("blocks.0", 12),
    "before its checkpoints are gone": ("blocks.1", 12),
}
"""Name of a point -> the block that is trained, and its step."""


def after(function: Callable[..., Any], holds: Callable[..., bool]) -> Callable[..., Any]:
    """Return a function that calls `function`, and then kills the process if `holds` is true for the arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if holds(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


def set_up(point: str) -> None:
    """Patch the engine so that this process kills itself at a point."""
    name, step = POINTS[point]

    def here(run: Any, *_: Any) -> bool:
        return (run.task.name, run.step) == (name, step)

    if point == "while a checkpoint is written":
        checkpoint._save_tensors = after(
            checkpoint._save_tensors,
            lambda path, tensors: path.name == "optimizer.safetensors" and f"-{step}" in path.parent.name,
        )
    elif point == "before the result is whole":
        block_run.save_file = after(block_run.save_file, lambda tensors, path: name in str(path))
    elif point == "before its checkpoints are gone":
        block_run.drop_checkpoints = after(lambda folder: None, lambda folder: folder.name == name)
    else:
        block_run.BlockRun._outputs = after(block_run.BlockRun._outputs, here)


def main(folder: Path) -> None:
    pipe, _ = pipeline("Wan")
    records = Records.read(folder / "records")
    for point in POINTS:
        child = os.fork()
        if not child:
            set_up(point)
            reconstruct(tasks(pipe.transformer, "Wan"), records, settings(folder / point))
            os._exit(0)  # the process was not killed, and the parent reports this
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), (point, status)
        assert os.WTERMSIG(status) == signal.SIGKILL, (point, status)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
