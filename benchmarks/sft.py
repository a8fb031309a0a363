"""Supervised fine-tuning of the embedded model on words that it has never read of a body, and what it forgets.

    python -m benchmarks.sft train --gpus 0 --each 4 --seconds 560 --back back/sft     # repeat while it exits with 3
    python -m benchmarks.sft exact                                                     # resume, on the CPU
    python -m benchmarks.sft report --docs                                             # result, sheets, tables
    python -m benchmarks.sft table                                                     # the arms

`train` writes a folder of clips and captions, measures the base model, trains the arms of `benchmarks.sft_arms`
several at a time and measures each run. After `--seconds` the runs save a checkpoint; the exit code is 0 if all is
done, 1 if a job failed, and 3 if the command has to be repeated. `--back FOLDER` keeps the complete measurements in a
few small files. `--unpack FOLDER` restores them on another machine, which trains only the runs that are not measured.
With `--tiny --gpus` (no number) everything runs on a CPU, to show that it
runs: give such runs an `--out` of their own.

Rules, fixed before the runs:

- In the new world yellow is called sage and green is called slate; the base model has never read these words before a
  body (`benchmarks.sft_clips`). Two runs before showed new hues, first called lime and emerald, then sage and slate:
  no clip of any arm was wholly right, because the autoencoder shows no new hues. `data` checks this first now.
- 512 training clips and 128 held-out clips of the new world, 512 clips of the old world for the arms with replay; one
  or two bodies, static camera. The clips are video files, as those of users.
- Prompts and training clips have separate scenes. Two words make few captions of one body, so captions may recur.
- Every run has 400 steps of 32 clips. No run is stopped, chosen or repeated because of its results; the exported
  (averaged) weights of the last step count. Learning rates: 5e-4 for a LoRA, 1e-4 for all weights.
- The gates read the arm `full_replay`, named before the runs; the other arms are rows of the tables. `full_old`
  shows what the training itself changes, without a new world. Seeds 0, 1, 2.
- `sft_new_world_right`: share of wholly right clips (`Report.all_right`) of 128 new prompts, mean over the seeds. The
  judge reads the prompt with yellow and green. The exact clips, encoded and decoded, give the ceiling.
- `sft_old_world_drop`: base minus tuned share of wholly right clips of 512 old prompts with the same noise; the gate
  reads the upper end of the 95 % interval over seeds and prompts. `world_judge`, which no run trains on, and the
  motion ratio stand beside.
- Guidance scale and steps are those with which users run the model. 96 px, 17 frames.
- `sft_wan_1p3b_peak_gb` is the measured peak of `benchmarks.small_cards` at the shape of Wan 1.3B.

Calls, with estimates for one H200 (15 runs of 400 steps, four at a time, and 15 measurements of 640 clips):

    train --arms full_replay                                  3 min
    train                                                     8 min, all five arms
    exact                                                     2 min on one core
    report --docs                                             seconds
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import job_queue, sft_exact, sft_report
from benchmarks.command import ended
from benchmarks.dancegrpo_arms import measurements
from benchmarks.lit_video_files import unpack
from benchmarks.queued_arms import add_places, add_queue, add_report, check_gpus, keep, run_queue, words_of
from benchmarks.sft_arms import ARMS, BASE, OUT, SEEDS, Run, data_job, measure_job, named_arms


def jobs_of(runs: Sequence[Run], words: Sequence[str]) -> list[job_queue.Job]:
    """Return the unfinished measurements of some runs and of the base model, with the jobs that they need.

    A run whose measurements are complete is not trained again only to have its weights, which stay on their machine.
    """
    out = runs[0].out
    goals = [measure_job(out, BASE, words, ("data",)), *(run.measure_job(words) for run in runs)]
    jobs = [data_job(out, words), goals[0]]
    for run, goal in zip(runs, goals[1:], strict=True):
        jobs += [run.job(words), goal]
    every = {job.name: job for job in jobs}
    # Runs that fork need their first run even if only the fork is asked for.
    for run in runs:
        if forks := ARMS[run.arm].forks:
            first = Run(arm=forks, seed=run.seed, out=out, tiny=run.tiny)
            every.setdefault(first.name, first.job(words))
    return job_queue.wanted(every, [goal.name for goal in goals])


def kept_files(out: Path) -> Iterator[Path]:
    """Yield the files of a folder to bring back, the most important ones first."""
    yield from measurements(out)
    yield from sorted(out.glob("*.json"))
    yield from sorted((out / "measured").glob("base-*.safetensors"))  # for the contact sheets of later runs
    yield from sorted((out / "measured").glob("*.0.*.png"))
    yield from sorted((out / "logs").glob("*.log"))


def work_on(options: argparse.Namespace) -> int:
    """Train and measure, and return the exit code."""
    check_gpus(options.gpus)
    runs = [
        Run(arm=arm, seed=seed, out=options.out, tiny=options.tiny)
        for seed in options.seeds
        for arm in named_arms(options.arms)
    ]
    return run_queue(options, jobs_of(runs, words_of(options)), lambda: keep(options, kept_files))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    for name in ("train", "exact", "report"):
        add_places(commands.add_parser(name), OUT)
    add_queue(commands.choices["train"], "tuned", SEEDS)
    add_report(commands.choices["report"], "sft")
    commands.add_parser("table")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the command line names."""
    options = parser().parse_args(argv)

    def work() -> int:
        if options.command == "table":
            print("\n".join(sft_report.arms()))
            return 0
        if options.unpack is not None:
            unpack(options.unpack, options.out)
        if options.command == "train":
            return work_on(options)
        if options.command == "exact":
            options.out.mkdir(parents=True, exist_ok=True)
            print(json.dumps(sft_exact.exact(options.out)))
            keep(options, kept_files)
        else:
            sft_report.write(options.out, options.output, docs=options.docs)
        return 0

    return ended("benchmarks.sft", work)


if __name__ == "__main__":
    sys.exit(main())
