"""Train one run of `python -m benchmarks.dancegrpo` in its own process; see `benchmarks.dancegrpo_arms`.

RUN/snapshots has the averaged weights at the marks of the budget, in float16, with step and cost. Beside them, `raw`
has the weights without averaging at the end. RUN/done.json exists once the budget is used. A repeated command resumes
a stopped run from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.arm_runs import run_job
from benchmarks.dancegrpo_arms import ARMS, OUT, ROOT, Run
from benchmarks.gates import device
from postgen.files import replacing
from postgen.info import versions
from postgen.tensor_files import opened
from postgen.training import Reason, load_recipe

RAW = "raw"


class Snapshots(TrainerCallback):  # type: ignore[misc]
    """Keeps the averaged weights whenever the meter passes a mark, and ends the run at the last mark.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.trainer = run, None
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Look at the cost after each update."""
        trainer: Any = self.trainer
        spent = trainer.meter.forward_equivalents
        passed = sum(spent >= mark for mark in self.run.marks)
        target = snapshot(self.run, passed)
        if passed and not target.is_file():
            with trainer.for_inference():
                write(target, trainer.trained(), self._head(trainer))
        if passed == len(self.run.marks):
            if not (raw := self.run.folder / "snapshots" / f"{RAW}.safetensors").is_file():
                write(raw, trainer.trained(), self._head(trainer))
            control.should_training_stop = True

    def _head(self, trainer: Any) -> dict[str, str]:
        spent = trainer.meter.read()
        return {
            "step": str(trainer.global_step),
            "forward_equivalents": str(spent["forward_equivalents"]),
            "transformer_seconds": str(spent["transformer_seconds"]),
        }


def snapshot(run: Run, number: int) -> Path:
    """Return the file of the weights at the `number`-th mark, counted from 1."""
    return run.folder / "snapshots" / f"{number:02d}.safetensors"


def write(path: Path, weights: dict[str, Any], head: dict[str, str]) -> None:
    """Write weights in float16, with step and cost as metadata."""
    path.parent.mkdir(exist_ok=True)
    tensors: dict[str, Tensor] = {
        name: value.detach().to("cpu", torch.float16).contiguous() for name, value in weights.items()
    }
    with replacing(path) as part:
        save_file(tensors, part, metadata=head)


def head_of(path: Path) -> dict[str, float]:
    """Return step and cost of a snapshot."""
    with opened(path) as file:
        return {name: float(value) for name, value in file.metadata().items()}


def train(run: Run, device_name: str) -> None:
    """Train a run to the end of its budget.

    Raises:
        SystemExit: the run was stopped before.
    """
    words = [*run.words(), *(["--device", "cpu"] if device_name == "cpu" else [])]
    kind, config = load_recipe(ROOT / "recipes" / f"{ARMS[run.arm].recipe}.yaml", words)
    keeper = Snapshots(run)
    trainer: Any = kind(args=config, callbacks=[keeper])  # type: ignore[call-arg]
    keeper.trainer = trainer
    result = trainer.train()
    if result.reason is not Reason.CALLBACK:
        raise SystemExit(f"{run.name} was stopped at step {result.global_step}: run the command again")
    spent = trainer.meter.read()
    row = {"steps": result.global_step, "seconds": time.monotonic() - keeper.began, "spent": spent}
    row |= {"device": device(), "versions": versions(), "settings": list(run.words())}
    with replacing(run.done) as part:
        part.write_text(json.dumps(row, default=str) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Train the run that the command line names."""

    def work(options: argparse.Namespace) -> None:
        train(Run.named(options.name, options.out, tiny=options.tiny), options.device)

    return run_job("benchmarks.dancegrpo_job", __doc__, "name of the run, ARM.SEED", OUT, work, argv)


if __name__ == "__main__":
    sys.exit(main())
