"""Train the arms of WorldWeaver's experiment, several side by side on each GPU.

    python -m benchmarks.worldweaver_arms --arms a d e --seeds 0 1 2 --gpus 0 1 --out runs/arms -- --max_steps 1500

What follows `--` goes to every run, on top of the arm's own settings and `recipes/worldweaver-tiny.yaml`. A run is in
OUT/ARM.SEED, its log beside it in OUT/ARM.SEED.log, what it trained in OUT/ARM.SEED/export. Runs that are done are
left alone, others begin anew. One run renders and encodes the clips (OUT/pool) before the others, which find them.
`benchmarks.worldweaver` measures what comes out; `--table` prints the arms.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.side_by_side import run_all, started

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
"""What each arm is, and its settings on top of the recipe."""
RECIPE = "recipes/worldweaver-tiny.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    out: Path

    @property
    def name(self) -> str:
        """As `benchmarks.worldweaver` wants it."""
        return f"{self.arm}.{self.seed}"

    @property
    def folder(self) -> Path:
        """What the run writes to."""
        return self.out / self.name

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.out / f"{self.name}.log"

    @property
    def done(self) -> bool:
        """Whether it has run to its end: an interrupted run exports too, and says so."""
        return self.log.is_file() and "what was trained is in" in self.log.read_text(encoding="utf-8")

    def command(self, more: Sequence[str]) -> list[str]:
        """Return the words that train it; later ones replace earlier ones."""
        where = ["--output_dir", str(self.folder), "--pool_dir", str(self.out / "pool"), "--seed", str(self.seed)]
        return [sys.executable, "-m", "postgen", "train", RECIPE, *where, *ARMS[self.arm][1].split(), *more]


def train(runs: Sequence[Run], gpus: Sequence[str], each: int, more: Sequence[str]) -> list[str]:
    """Train what is not done yet, and return the names of runs that failed.

    Args:
        runs: which; the first of them renders the clips.
        gpus: numbers of GPUs; none means the CPU.
        each: runs at a time on one.
        more: settings of all.
    """
    waiting = [run for run in runs if not run.done]
    if not waiting:
        return []
    waiting[0].out.mkdir(parents=True, exist_ok=True)
    failed = []
    if len(waiting) > 1:
        failed = _render(max(waiting, key=_needs), gpus, more)
    if failed:
        return failed
    return run_all(waiting, gpus, each, lambda run, place: _started(run, place, more))


def _needs(run: Run) -> int:
    """How much a run asks of the clips: RGB, depth, where cameras stand."""
    words = ARMS[run.arm][1]
    return 2 if "--placed_memory true" in words else 0 if "--aux []" in words else 1


def _render(run: Run, gpus: Sequence[str], more: Sequence[str]) -> list[str]:
    """Let a run of one step render the clips, those of placed memory too where an arm needs them."""
    first = Run(arm=run.arm, seed=run.seed, out=run.out / "pool-run")
    first.out.mkdir(exist_ok=True)
    words = [*more, "--pool_dir", str(run.out / "pool"), "--max_steps", "1", "--eval_steps", "0"]
    process = _started(first, next(iter(gpus), ""), words)
    try:
        process.wait()
    finally:
        process.terminate()
    if not first.done:
        print(f"the clips could not be rendered, see {first.log}", flush=True)
    return [] if first.done else ["pool"]


def _started(run: Run, gpu: str, more: Sequence[str]) -> subprocess.Popen[bytes]:
    return started(run.command(more if gpu else [*more, "--device", "cpu"]), run.log, gpu)


def table() -> str:
    """Return the arms as a table of the documentation."""
    rows = [f"| {name} | {what} | {f'`{words}`' if words else 'none'} |" for name, (what, words) in ARMS.items()]
    return "\n".join(["| Arm | | Settings on top of `worldweaver-tiny.yaml` |", "|---|---|---|", *rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is asked for."""
    words = list(sys.argv[1:] if argv is None else argv)
    words, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["a", "d", "e", "j"], metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--gpus", nargs="*", default=["0"], help="numbers of GPUs; none trains on the CPU")
    parser.add_argument("--each", type=int, default=4, help="runs at a time on a GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/arms"))
    parser.add_argument("--table", action="store_true", help="print the arms; nothing is trained")
    options = parser.parse_args(words)
    if options.table:
        print(table())
        return 0
    runs = [Run(arm=arm, seed=seed, out=options.out) for seed in options.seeds for arm in options.arms]
    return 1 if train(runs, options.gpus, options.each, more) else 0


if __name__ == "__main__":
    sys.exit(main())
