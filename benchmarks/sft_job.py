"""Train one run of `python -m benchmarks.sft` in its own process, or write the training clips (`data`)."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.arm_runs import run_job
from benchmarks.embedded_sampling import load
from benchmarks.gates import device
from benchmarks.sft_arms import ARMS, OUT, Run
from benchmarks.sft_clips import check_autoencoder, write_folder
from postgen.assets import embedded_model
from postgen.families import denoiser_for
from postgen.files import replacing
from postgen.info import versions
from postgen.training import Reason, load_recipe

CLIPS = {"count": 512, "held_out": 128, "size": 96, "frames": 17}
TINY_CLIPS = {"count": 4, "held_out": 2, "size": 32, "frames": 5}
CHANGED = ("learning_rate", "lr_scheduler_type", "warmup_steps")
"""Settings in which an arm that forks from another one differs."""


def train(run: Run, device_name: str) -> None:
    """Train a run to its last step.

    Raises:
        SystemExit: the run was stopped before.
    """
    more: dict[str, Any] = {"device": "cpu"} if device_name == "cpu" else {}
    if ARMS[run.arm].forks:
        more["allow_changed"] = list(CHANGED)
    kind, config = load_recipe(run.recipe(**more))
    trainer: Any = kind.from_config(config)  # type: ignore[attr-defined]
    began = time.monotonic()
    result = trainer.train()
    if result.reason is not Reason.DONE:
        raise SystemExit(f"{run.name} was stopped at step {result.global_step}: run the command again")
    row = {"steps": result.global_step, "seconds": time.monotonic() - began, "device": device()}
    row |= {"versions": versions(), "settings": {**run.settings(), **more}}
    if torch.cuda.is_available() and device_name != "cpu":
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    with replacing(run.done) as part:
        part.write_text(json.dumps(row, default=str) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line names."""

    def work(options: argparse.Namespace) -> None:
        if options.name == "data":
            sizes = TINY_CLIPS if options.tiny else CLIPS
            if not options.tiny:
                check_autoencoder(denoiser_for(load(embedded_model(), options.device)), device=options.device)
            write_folder(options.out / "data", device=options.device, **sizes)
        else:
            train(Run.named(options.name, options.out, tiny=options.tiny), options.device)

    return run_job("benchmarks.sft_job", __doc__, "name of the run, ARM.SEED, or data", OUT, work, argv)


if __name__ == "__main__":
    sys.exit(main())
