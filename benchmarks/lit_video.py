"""Quality of hybrid linear attention on video models that anyone can train: teacher, students, measures, report.

    torchrun --nproc_per_node 2 -m postgen.train recipes/tiny-wan-fine.yaml          # the teacher
    python -m benchmarks.lit_video --group types --gpus 0 1                          # layer types, one seed
    python -m benchmarks.lit_video --group winner --gpus 0 1                         # the best of them, three seeds
    python -m benchmarks.lit_video --group embedded --model embedded --two --out runs/lit-embedded --gpus 0 1
    python -m benchmarks.lit_video --report --embedded runs/lit-embedded --docs

Several jobs (`benchmarks.lit_video_arms`) run at the same time on each GPU; jobs that others need run first. Finished
jobs are skipped, so a repeated command continues where it stopped; repeat it until its exit code is 0 (1: a job
failed, 2: invalid input, 3: jobs are left). `--seconds` limits the time. `--back FOLDER` saves
the results so far to a few small files, every minute and at the end, and `--unpack FOLDER` restores them. The rules of
the experiment are in docs/lit_video.md. A small run on a CPU:

    python -m benchmarks.lit_video --group types --model embedded --gpus --types delta_r0 --tiny --out runs/try
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import lit_video_report
from benchmarks.command import ended
from benchmarks.job_queue import SAVE_EVERY, SAVE_GRACE, exit_code, lock_of, places_on, run_jobs
from benchmarks.lit_video_arms import (
    ARMS,
    GROUPS,
    TYPES,
    check_settings,
    jobs_of,
    read_jobs,
    read_results,
    table,
    winner_of,
)
from benchmarks.lit_video_files import pack, unpack
from benchmarks.lit_video_job import SIZES, add_options
from postgen import world
from postgen.errors import UserError, check_number
from postgen.files import replacing
from postgen.world.scenes import FIRST_TRAINING_SEED, draw_scenes

PROMPTS = 2048
"""Number of prompts for the training of students."""
BODIES = {False: (0.75, 0.25, 0.0), True: (0.4, 0.5, 0.1)}
"""Shares of scenes with one, two and three bodies, by whether two bodies are measured."""
TINY = {"prompts": 3, "max_steps": 2, "batch": 2, "transfer_steps": 2, "transfer_prompts": 4, "steps": 2}
TINY |= {"size": 32, "frames": 17, "train_prompts": 6}


def write_prompts(path: Path, count: int, *, two: bool) -> None:
    """Write prompts for scenes of the training split, in the plainest wording; an existing file stays.

    Raises:
        UserError: the existing file has another number of prompts.
    """
    if path.is_file():
        if (there := len(path.read_text(encoding="utf-8").splitlines())) != count:
            raise UserError(f"{path} has {there:,} prompts, but --train_prompts is {count:,}: choose another --out")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Seeds that the pools of the teacher's training do not use.
    scenes = draw_scenes(FIRST_TRAINING_SEED + 90_000_000, count, 33, bodies=BODIES[two])
    lines = [json.dumps({"prompt": world.simple_caption(scene.spec)}) for scene in scenes]
    with replacing(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """Run the jobs of a group, and return the exit code.

    Raises:
        UserError: invalid options, another command that works in the folder, or results with other settings there.
    """
    _check_options(options)
    places = places_on(options.gpus, options.each)
    winner = "" if options.group in ("teacher", "types") else options.winner
    if winner == "auto":
        winner = winner_of(read_results(options.winner_from or options.out), options.types or TYPES)
        print(f"winner: {winner}", flush=True)
    jobs = jobs_of(options.group, winner, options.out, words)
    if options.types:
        jobs = [job for job in jobs if job.name.count(".") < 2 or {*options.types} & {*job.name.split(".")}]

    def keep() -> None:
        if options.back is not None:
            pack(options.out, options.back)

    with lock_of(options.out):
        check_settings(options.out, read_jobs(options.out), vars(options))
        write_prompts(options.out / "prompts.jsonl", options.train_prompts, two=options.two)
        (options.out / "jobs").mkdir(exist_ok=True)
        todo = [job.queued() for job in jobs if not job.done]
        left = run_jobs(todo, places, seconds=options.seconds, tick=keep, every=SAVE_EVERY, grace=SAVE_GRACE)
    return exit_code(left)


def _check_options(options: argparse.Namespace) -> None:
    check_number("--seconds", options.seconds, 0)
    for name in ("max_steps", "batch", "transfer_steps", *SIZES):
        if getattr(options, name) is not None:
            check_number(f"--{name}", getattr(options, name), 1)
    for name in ("prompts", "train_prompts"):
        check_number(f"--{name}", getattr(options, name), 2)
    check_number("--transfer_prompts", options.transfer_prompts, 2, options.train_prompts)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(made)
    add = made.add_argument
    add("--group", choices=GROUPS, help="jobs to run")
    add("--types", nargs="+", choices=[*TYPES], metavar="TYPE", help=f"run only these layer types: {', '.join(TYPES)}")
    add("--winner", default="auto", help="layer type of the groups winner and embedded (default: chosen by the rule)")
    add("--winner_from", type=Path, metavar="OUT", help="folder whose results decide the winner (default: --out)")
    add("--gpus", nargs="*", default=["0"], help="indices of the GPUs; no index for the CPU")
    add("--each", type=int, default=4, help="jobs at the same time on a GPU (default: 4)")
    add("--seconds", type=float, default=0.0, help="end after this number of seconds; 0 for no limit")
    add("--train_prompts", type=int, default=PROMPTS, help=f"number of prompts of stage 2 (default: {PROMPTS})")
    add("--tiny", action="store_true", help="two steps of everything, only to show that the benchmark runs")
    add("--back", type=Path, metavar="FOLDER", help="save the results so far here, in files of less than 16 MiB")
    add("--pack", type=Path, metavar="FOLDER", help="only save this folder to --back")
    add("--unpack", type=Path, metavar="FOLDER", help="only restore the saved files of this folder to --out")
    add("--table", action="store_true", help="print the table of arms")
    add("--report", action="store_true", help="write the video part of results/lit.json")
    add("--embedded", type=Path, metavar="OUT", help="with --report: folder of the group embedded")
    add("--docs", action="store_true", help="with --report: also write the tables of docs/lit_video.md")
    add("-o", "--output", default="lit", help="with --report: name or path of the result file")
    return made


def job_words(options: argparse.Namespace) -> list[str]:
    """Return the command-line options that every job receives."""
    words = ["--model", str(options.model), "--out", str(options.out), "--device", options.device]
    for name in ("prompts", "max_steps", "batch", "transfer_steps", "transfer_prompts"):
        words += [f"--{name}", str(getattr(options, name))]
    for name in SIZES:
        words += [f"--{name}", str(getattr(options, name))] if getattr(options, name) else []
    return words + (["--two"] if options.two else [])


def main(argv: Sequence[str] | None = None) -> int:
    """Run jobs, save or restore results, or write the report.

    The exit code is 0 if all jobs are finished, 1 if a job failed, 2 after invalid input, and 3 if jobs are left for
    another call. After a signal it is 130, 143 or 129.
    """
    options = parser().parse_args(argv)
    return ended("benchmarks.lit_video", lambda: _work(options))


def _work(options: argparse.Namespace) -> int:
    if options.tiny:
        vars(options).update(TINY)
    if not options.gpus:
        options.device = "cpu"
    if options.table:
        print(table())
    elif options.pack is not None or options.unpack is not None:
        if options.unpack is not None:
            unpack(options.unpack, options.out)
        elif options.back is None:
            raise UserError("--pack needs --back, the folder for the saved files")
        else:
            print(*pack(options.pack, options.back), sep="\n")
    elif options.report:
        lit_video_report.write(options.out, options.embedded, options.output, docs=options.docs)
    elif options.group is None:
        raise UserError(
            f"nothing to do: give one of --group ({', '.join(GROUPS)}), --report, --table, --pack or --unpack"
        )
    else:
        return run(options, job_words(options))
    return 0


__all__ = ["ARMS", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
