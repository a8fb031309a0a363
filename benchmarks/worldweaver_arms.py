"""Train the arms of WorldWeaver's experiment, several at the same time on each GPU.

    python -m benchmarks.worldweaver_arms --arms a d e --seeds 0 1 2 --gpus 0 1 --out runs/arms -- --max_steps 1500

The options after `--` are settings of every run, on top of the arm's own settings and `recipes/worldweaver-tiny.yaml`.
A run writes to OUT/ARM.SEED, its log is OUT/ARM.SEED.log, and OUT/ARM.SEED/export holds the adapter. First, one run
renders and encodes the clips (OUT/pool), which all other runs read. `--seconds` limits the time of the call: runs save
a checkpoint, and the same command, repeated, resumes them and skips finished runs. The exit code is 0 if all runs are
finished, 1 if a run failed, and 3 if the command has to be repeated. `benchmarks.worldweaver` measures the adapters;
`--table` prints the arms.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import ended
from benchmarks.job_queue import Job, places_on, run_jobs

ARMS: dict[str, tuple[str, str]] = {
    "a": (
        "chunk after chunk, clean RGB memory",
        "--aux [] --groups 1 --mem_noise 0 --mem_noise_max 0 --short_noise_max 0 --corrupt_share 0",
    ),
    "b": ("noise on RGB memory", "--aux [] --groups 1"),
    "c": ("depth, but not in memory", "--groups 1 --depth_in_memory false"),
    "d": ("clean depth in memory", "--groups 1"),
    "e": ("three groups in flight", ""),
    "f": ("independent levels", "--independent_share 1"),
    "g2": ("two groups in flight", "--groups 2 --num_inference_steps 20"),
    "g5": ("five groups in flight", "--groups 5 --num_inference_steps 20"),
    "h_recent": ("the last frames as memory", "--memory_policy recent"),
    "h_uniform": ("evenly spaced memory", "--memory_policy uniform"),
    "h_depth_sim": ("memory with similar depth", "--memory_policy depth_sim"),
    "h_camera": ("memory that saw the same place", "--memory_policy camera"),
    "i": ("depth and flow", "--aux depth flow"),
    "j": ("placed memory", "--placed_memory true"),
    "j_only": ("placed memory instead of long memory", "--placed_memory true --history_sizes 0 2"),
}
"""Name of an arm -> its description, and its settings on top of the recipe."""
RECIPE = "recipes/worldweaver-tiny.yaml"
GRACE = 30.0
"""Seconds between the signal to stop and the end of a run, in which it finishes its step and saves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Training of one arm with one seed."""

    arm: str
    seed: int
    out: Path

    @property
    def name(self) -> str:
        """Name ARM.SEED, the form that `benchmarks.worldweaver` expects."""
        return f"{self.arm}.{self.seed}"

    @property
    def folder(self) -> Path:
        """Output folder of the run."""
        return self.out / self.name

    @property
    def log(self) -> Path:
        """File with the printed output of the run."""
        return self.out / f"{self.name}.log"

    def job(self, more: Sequence[str]) -> Job:
        """Return the job of the training. Its mark OUT/ARM.SEED.done exists once the run has reached its last step."""
        mark = self.out / f"{self.name}.done"
        return Job(name=self.name, command=tuple(self.command(more)), log=self.log, mark=mark)

    def command(self, more: Sequence[str]) -> list[str]:
        """Return the command line of the training. If an option occurs twice, the later value counts."""
        where = ["--output_dir", str(self.folder), "--pool_dir", str(self.out / "pool"), "--seed", str(self.seed)]
        words = [RECIPE, *where, *ARMS[self.arm][1].split(), *more, "--resume_from_checkpoint", "auto"]
        return [sys.executable, "-m", "postgen", "train", *words]


def train(
    runs: Sequence[Run], gpus: Sequence[str], each: int, more: Sequence[str], seconds: float = 0.0
) -> dict[str, str]:
    """Train the unfinished runs.

    Args:
        runs: the runs, in the order in which they start.
        gpus: numbers of the GPUs; none for the CPU.
        each: number of runs at the same time on one GPU.
        more: settings of all runs.
        seconds: time after which the runs save a checkpoint and end; 0 for no limit.

    Returns:
        Name of each run that is not finished -> the reason, one of those of `run_jobs`.
    """
    began = time.monotonic()
    words = [*more] if any(gpus) else [*more, "--device", "cpu"]
    jobs = [job for run in runs if not (job := run.job(words)).done]
    if len(jobs) > 1:
        first = _rendering(max(runs, key=_needs), words)
        left = {} if first.done else run_jobs([first], places_on(gpus, 1)[:1], seconds=seconds, grace=GRACE)
        if "failed" in left.values():
            print(f"the clips could not be rendered: see {first.log}", flush=True)
        if left:
            return left
    limit = max(1.0, seconds - (time.monotonic() - began)) if seconds else 0.0
    return run_jobs(jobs, places_on(gpus, each), seconds=limit, grace=GRACE, go_on=False)


def _needs(run: Run) -> int:
    """Return how much a run reads of each clip: 0 for RGB, 1 for RGB and depth, 2 for camera poses too."""
    words = ARMS[run.arm][1]
    return 2 if "--placed_memory true" in words else 0 if "--aux []" in words else 1


def _rendering(run: Run, more: Sequence[str]) -> Job:
    """Return a job of one training step that renders the clips, and the inputs of placed memory if the run needs them.

    If other runs need clips with other settings, the first of them renders these clips.
    """
    first = Run(arm=run.arm, seed=run.seed, out=run.out / "pool-run")
    words = [*more, "--pool_dir", str(run.out / "pool"), "--max_steps", "1", "--eval_steps", "0"]
    return dataclasses.replace(first.job(words), name="pool")


def table() -> str:
    """Return the arms as a Markdown table."""
    rows = [f"| {name} | {what} | {f'`{words}`' if words else 'none'} |" for name, (what, words) in ARMS.items()]
    return "\n".join(["| Arm | | Settings on top of `worldweaver-tiny.yaml` |", "|---|---|---|", *rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Train the arms that the command line names."""
    words = list(sys.argv[1:] if argv is None else argv)
    words, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=["a", "d", "e", "j"], metavar="ARM", help="arms to train"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of the training")
    parser.add_argument("--gpus", nargs="*", default=["0"], help="numbers of the GPUs; no number for the CPU")
    parser.add_argument("--each", type=int, default=4, help="runs at the same time on a GPU (default: 4)")
    parser.add_argument("--out", type=Path, default=Path("runs/arms"), help="output folder")
    parser.add_argument("--seconds", type=float, default=0.0, help="save and end after this time; 0: no limit")
    parser.add_argument("--table", action="store_true", help="only print the arms")
    options = parser.parse_args(words)
    if options.table:
        print(table())
        return 0
    runs = [Run(arm=arm, seed=seed, out=options.out) for seed in options.seeds for arm in options.arms]

    def work() -> int:
        left = train(runs, options.gpus, options.each, more, options.seconds)
        for name, why in left.items():
            print(f"{name}: {why}")
        return 1 if "failed" in left.values() else 3 if left else 0

    return ended("benchmarks.worldweaver_arms", work, "repeat the same command to resume the runs")


if __name__ == "__main__":
    sys.exit(main())
