"""Interpolate a hacked reward training towards the base model, for `python -m benchmarks.merging`.

The runs are the arms `hack` of `python -m benchmarks.dancegrpo`: one easily hacked reward and twice the learning rate.
Their last checkpoint counts. The job measures it, the base model, and base + eta (hacked - base), which is
`postgen merge HACKED -o OUT --base BASE --eta ETA`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import job_queue
from benchmarks.arm_runs import add_job_options
from benchmarks.command import ended
from benchmarks.dancegrpo_arms import ARMS, HACK, Run, complete
from benchmarks.dancegrpo_clips import Bench, Sizes
from benchmarks.dancegrpo_measure import motion_ratio, read_file, settings_of, write_file
from benchmarks.gates import device
from benchmarks.sft_arms import OUT
from postgen.errors import UserError
from postgen.info import versions

ETAS = (0.25, 0.5, 0.75)
"""Shares of the way from the base model to the hacked one; 0 would win everything back and keep nothing."""
GROUPS = ("valid", "test")
LEAST_LOSS = 0.02
"""A run whose exact score falls by less is not hacked, and has nothing to win back."""


def last_snapshot(run: Run) -> Path:
    """Return the weights at the end of a hacked run.

    Raises:
        UserError: the run is not trained, or its weights are not on this machine.
    """
    files = sorted((run.folder / "snapshots").glob("[0-9]*.safetensors"))
    if not files or not run.done.is_file():
        raise UserError(
            f"{run.folder} has no trained weights: run `python -m benchmarks.dancegrpo train --arms hack --seeds"
            f" {run.seed} --out {run.out}` on this machine first"
        )
    return files[-1]


def measure(run: Run, place: Path, device_name: str) -> None:
    """Measure the base model, the hacked model and the interpolations; an interrupted call continues."""
    sizes = Sizes.of(tiny=run.tiny)
    settings = settings_of(sizes)
    bench, file, found = Bench(sizes, device_name), last_snapshot(run), read_file(place, settings)
    for share in (0.0, *ETAS, 1.0):
        if f"{share:g}" not in found["points"]:
            bench.use(file if share else None, share)
            found["points"][f"{share:g}"] = {group: bench.group(group)[0] for group in GROUPS}
            write_file(place, found)
            print(f"{run.name}, eta {share:g}: measured", flush=True)
    found |= {"complete": True, "arm": run.arm, "seed": run.seed, "device": device(), "versions": versions()}
    write_file(place, found)


def place_of(out: Path, name: str) -> Path:
    """Return the file with the measurements of a hacked run."""
    return out / "measured" / f"hacked-{name}.json"


def job(out: Path, hacked: Path, name: str, words: Sequence[str]) -> job_queue.Job:
    """Return the job that measures one hacked run; `words` are options of the command."""
    place = place_of(out, name)
    return job_queue.Job(
        name=f"hacked.{name}",
        command=(sys.executable, "-m", "benchmarks.merging_hacked", name, "--hacked", str(hacked), *words),
        log=out / "logs" / f"hacked.{name}.log",
        check=lambda: complete(place),
    )


def names_in(hacked: Path) -> list[str]:
    """Return the trained hacked runs in an output folder of `benchmarks.dancegrpo`."""
    return sorted(path.parent.name for arm in HACK for path in hacked.glob(f"runs/{arm}.*/done.json"))


def row_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chosen eta of a hacked run and what it wins back.

    The held-out judge (`clip`, or `judge` for the arm that trains on `clip`) chooses eta on validation prompts. The
    loss is that of the score of the exact judge on test prompts.
    """
    reward = ARMS[found["arm"]].reward[0]
    judge = "judge" if reward == "clip" else "clip"
    points = found["points"]

    def mean(share: str, group: str, name: str) -> float:
        return statistics.fmean(value for value in points[share][group][name] if value is not None)

    eta = max((f"{share:g}" for share in ETAS), key=lambda share: mean(share, "valid", judge))
    base, worst, ours = (mean(share, "test", "world") for share in ("0", "1", eta))
    trained = [mean(share, "test", reward) for share in ("0", "1", eta)]
    lost, gained = base - worst, trained[1] - trained[0]
    return {
        "run": f"{found['arm']}.{found['seed']}",
        "device": found.get("device"),
        "judge": judge,
        "eta": float(eta),
        "exact": {"base": base, "hacked": worst, "interpolated": ours},
        "recovered": (ours - worst) / lost if lost >= LEAST_LOSS else None,
        "reward_kept": (trained[2] - trained[0]) / gained if gained > 0 else None,
        "motion": {
            name: motion_ratio(points[share]["test"]["motion"], points["0"]["test"]["motion"])
            for name, share in (("hacked", "1"), ("interpolated", eta))
        },
        "by_eta": {share: mean(share, "test", "world") for share in points},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the run that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the hacked run, ARM.SEED")
    parser.add_argument("--hacked", type=Path, default=Path("runs/dancegrpo"), help="output of benchmarks.dancegrpo")
    add_job_options(parser, OUT)
    options = parser.parse_args(argv)

    def work() -> int:
        torch.set_float32_matmul_precision("high")
        run = Run.named(options.name, options.hacked, tiny=options.tiny)
        measure(run, place_of(options.out, options.name), options.device)
        return 0

    return ended("benchmarks.merging_hacked", work)


if __name__ == "__main__":
    sys.exit(main())
