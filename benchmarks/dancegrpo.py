"""Training with rewards on the embedded model: recipes, counter-measures, reward hacking. One command for each part.

    python -m benchmarks.dancegrpo train --arms shipped --seeds 0 1 2 --gpus 0 --each 4 --seconds 560
    python -m benchmarks.dancegrpo measure                  # what 'train' has left unmeasured
    python -m benchmarks.dancegrpo exact                    # resume and two processes, on the CPU
    python -m benchmarks.dancegrpo report --docs            # result, pictures, tables of the pages
    python -m benchmarks.dancegrpo table                    # the arms

`train` runs the arms (`benchmarks.dancegrpo_arms`) several at a time on each GPU, and measures each run as soon as it
is trained (`--later` leaves that to `measure`). After `--seconds` the runs save a checkpoint. The exit code is 0 if
all is done, 1 if a job failed, and 3 if the command has to be repeated; it then continues. `--back FOLDER` keeps the
complete measurements in a few small files, and `--unpack FOLDER` restores them on another machine, which trains only
the runs that are not measured (with `--later` all runs, as their weights stay on their machine). With `--tiny --gpus`
(no number) everything runs on a CPU, to show that it runs: give such runs an `--out` of their own.

Rules, fixed before the runs:

- A run ends after the first update at which the meter reaches the budget of its arm. All passes count. At eighths
  of the budget the averaged weights (`ema_decay: 0.995`) are kept. No run is stopped or repeated because of its
  results.
- The result of a run is the checkpoint with the highest mean score of the exact judge on 128 validation prompts, among
  those that move 0.9 to 1.1 times as much as the base model there. The base model is one of the candidates.
- The 256 test prompts and their noise are the same for all arms. The held-out judges are `world_judge` and
  `world_clip`. Tables show all seeds.
- The learning rates are those of the recipes. The counter-measures and losses run with seed 0 first; the rule of
  `benchmarks.dancegrpo_report.screened` then names the arms that get the seeds 1 and 2 (`next` in the result).
- Arms that are hacked have one easily hacked reward and twice the learning rate, and their last checkpoint counts.

Calls, shortest useful first, with estimates for one H200; two take half of the time. (An H100 took 8.5, 2.5 and 1.7
minutes for one run alone of 220, 80 and 60 updates with evaluations. A run is measured in 45 seconds. Runs that share
a card are assumed to be 1.8 times as fast together.) A call of more than 9 minutes has to be repeated:

    train --arms nft --seeds 0 1 2                            4 min
    train --arms fast --seeds 0 1 2                           7 min
    train --arms faithful --seeds 0 1 2                      13 min
    train --arms hack --seeds 0                               5 min; --seeds 1 2: 10 min
    train --arms counter control --seeds 0 --each 5          13 min
    train --arms losses --seeds 0 --each 6                    7 min
    train --arms rewards --seeds 0 --each 6                   5 min
    train --arms shuffled NAMES --seeds 1 2                   8 min for the control and three arms
    exact                                                     1 min on a CPU
    report --docs                                             seconds
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import dancegrpo_exact, dancegrpo_pictures, dancegrpo_report, dancegrpo_tables, job_queue
from benchmarks.command import ended
from benchmarks.dancegrpo_arms import OUT, SEEDS, Run, base_job, check_arms, measurements, named_arms, table
from benchmarks.lit_video_files import unpack
from benchmarks.queued_arms import add_places, add_queue, add_report, check_gpus, keep, run_queue, words_of
from postgen.training.run_curves import read_metrics


def jobs_of(runs: Sequence[Run], words: Sequence[str], *, train: bool, measure: bool) -> list[job_queue.Job]:
    """Return the unfinished jobs of some runs; a run is measured as soon as it is trained.

    A run whose measurements are complete is not trained again only to have its weights, which stay on their machine.

    Args:
        runs: the runs in their order.
        words: options of all jobs.
        train: whether runs are trained; otherwise only trained runs are measured.
        measure: whether runs are measured.
    """
    base = base_job(runs[0].out, words)
    found = [base] if measure else []
    for run in runs:
        jobs = run.jobs(words)
        found += [jobs["train"]] if train and not (measure and jobs["measure"].done) else []
        found += [jobs["measure"]] if measure and (train or jobs["train"].done) else []
    return [job for job in found if not job.done]


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; an empty dict if it does not exist."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def progress(runs: Sequence[Run]) -> Iterator[str]:
    """Yield a line about each run that is being trained (update, checkpoints, mean reward) or measured."""
    for run in runs:
        if run.done.is_file():
            found = read_json(run.measured)
            if not found.get("complete", False):
                points = sum(name.isdigit() for name in found.get("points", ()))
                yield f"  {run.name}: trained, {points} of {len(run.marks)} checkpoints measured"
            continue
        rows = read_metrics(run.folder / "metrics.jsonl")
        if rows:
            points = len([*(run.folder / "snapshots").glob("[0-9]*.safetensors")])
            rewards = [row["reward"] for row in rows[-10:] if row.get("reward") is not None]
            mean = f", reward {sum(rewards) / len(rewards):.3f}" if rewards else ""
            yield f"  {run.name}: update {rows[-1]['step']}, {points} of {len(run.marks)} checkpoints{mean}"


def kept_files(out: Path) -> Iterator[Path]:
    """Yield the files of a folder to bring back, the most important ones first."""
    found = measurements(out)
    yield from found
    yield from out.glob(dancegrpo_exact.FILE)
    yield from (out / "measured").glob("base-clips.safetensors")  # for the contact sheets of later runs
    for path in found:
        said = read_json(path)
        for name in dict.fromkeys(said[which] for which in ("chosen", "last") if which in said):
            yield from (out / "measured").glob(f"{path.stem}.{name}.png")
    yield from sorted((out / "logs").glob("*.log"))


def work_on(options: argparse.Namespace) -> int:
    """Train or measure, and return the exit code."""
    names = named_arms(options.arms)
    check_gpus(options.gpus)
    check_arms(names, tiny=options.tiny)
    runs = [Run(arm=arm, seed=seed, out=options.out, tiny=options.tiny) for seed in options.seeds for arm in names]
    training = options.command == "train"
    jobs = jobs_of(runs, words_of(options), train=training, measure=not training or not options.later)

    def tick() -> None:
        for line in progress(runs):
            print(line, flush=True)
        keep(options, kept_files)

    return run_queue(options, jobs, tick)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    for name in ("train", "measure", "exact", "report"):
        add_places(commands.add_parser(name), OUT)
    commands.add_parser("table")
    train, report = commands.choices["train"], commands.choices["report"]
    for queue in (train, commands.choices["measure"]):
        add_queue(queue, "shipped", SEEDS)
    train.add_argument("--later", action="store_true", help="do not measure; 'measure' does it later")
    add_report(report, "dancegrpo")
    report.add_argument("--replace", action="store_true", help="replace a result of an earlier way of measuring")
    return made


def report(options: argparse.Namespace) -> None:
    """Write the result, the pictures and the tables."""
    where, payload = dancegrpo_report.write(options.out, options.output, replace=options.replace)
    if options.replace:
        dancegrpo_pictures.clear(where)
    for path in dancegrpo_pictures.write(options.out, payload, where):
        print(path)
    if options.docs:
        dancegrpo_tables.write_pages(options.output)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the command line names."""
    options = parser().parse_args(argv)

    def work() -> int:
        if options.command == "table":
            print(table())
            return 0
        if options.unpack is not None:
            unpack(options.unpack, options.out)
        if options.command == "exact":
            dancegrpo_exact.exact(options.out)
            keep(options, kept_files)
        elif options.command == "report":
            report(options)
        else:
            return work_on(options)
        return 0

    return ended("benchmarks.dancegrpo", work)


if __name__ == "__main__":
    sys.exit(main())
