"""Hybrid linear attention on video models that anyone can train: teacher, students, measures, report.

    torchrun --nproc_per_node 2 -m postgen.train recipes/tiny-wan-fine.yaml          # the teacher
    python -m benchmarks.lit_video --group types --gpus 0 1                          # layer types, one seed
    python -m benchmarks.lit_video --group winner --gpus 0 1                         # the best of them, three seeds
    python -m benchmarks.lit_video --group embedded --model embedded --two --out runs/lit-embedded --gpus 0 1
    python -m benchmarks.lit_video --report --embedded runs/lit-embedded --docs

Jobs (`benchmarks.lit_video_arms`) run several side by side on each GPU, those that others need first; a job that is
done is left alone, so a command that is given again goes on. `--seconds` ends it in time; `--back FOLDER` keeps what
there is in a few small files, anew every minute and at the end, and `--unpack FOLDER` puts them back. The rules of
the experiment are in docs/lit_video.md. On a CPU, small:

    python -m benchmarks.lit_video --group types --model embedded --gpus --types delta_r0 --tiny --out runs/try
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import lit_video_report
from benchmarks.lit_video_arms import ARMS, GROUPS, TYPES, Job, jobs_of, read_results, table, winner_of
from benchmarks.lit_video_files import pack, unpack
from benchmarks.lit_video_job import SIZES, add_options
from benchmarks.side_by_side import run_all, started
from postgen import world
from postgen.errors import UserError
from postgen.files import replacing
from postgen.world.scenes import FIRST_TRAINING_SEED, draw_scenes

PROMPTS = 2048
"""Prompts that students are trained on."""
BODIES = {False: (0.75, 0.25, 0.0), True: (0.4, 0.5, 0.1)}
"""Shares of scenes with one, two and three bodies, by whether two bodies are measured."""
EVERY = 60.0
"""Seconds between two writings of `--back`."""
TINY = {"prompts": 3, "max_steps": 2, "batch": 2, "transfer_steps": 2, "transfer_prompts": 4, "steps": 2}
TINY |= {"size": 32, "frames": 17, "train_prompts": 6}


def write_prompts(path: Path, count: int, *, two: bool) -> None:
    """Write prompts of scenes of the training split, the plainest wordings; a file that is there stays."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Seeds that no pool of the teacher's training has.
    scenes = draw_scenes(FIRST_TRAINING_SEED + 90_000_000, count, 33, bodies=BODIES[two])
    lines = [json.dumps({"prompt": world.simple_caption(scene.spec)}) for scene in scenes]
    with replacing(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(options: argparse.Namespace, words: Sequence[str]) -> list[str]:
    """Run the jobs of a group; return those that failed."""
    write_prompts(options.out / "prompts.jsonl", options.train_prompts, two=options.two)
    (options.out / "jobs").mkdir(exist_ok=True)
    winner = options.winner
    if winner == "auto":
        winner = (
            ""
            if options.group in ("teacher", "types")
            else winner_of(read_results(options.winner_from or options.out))
        )
        print(f"winner: {winner}", flush=True) if winner else None
    jobs = jobs_of(options.group, winner, options.out, words)
    if options.types:
        jobs = [job for job in jobs if job.name.count(".") < 2 or {*options.types} & {*job.name.split(".")}]
    begun = last = time.monotonic()

    def tick() -> None:
        nonlocal last
        if options.back is not None and time.monotonic() - last >= EVERY:
            pack(options.out, options.back)
            last = time.monotonic()

    def start(job: Job, gpu: str) -> object:
        print(
            f"{time.monotonic() - begun:5.0f} s: {job.name} begins on {f'GPU {gpu}' if gpu else 'the CPU'}", flush=True
        )
        return started([sys.executable, "-m", "benchmarks.lit_video_job", job.name, *job.words], job.log, gpu)

    until = None if options.seconds is None else begun + options.seconds
    more = {"ready": lambda job: job.ready, "until": until, "tick": tick, "go_on": True}
    failed = run_all(jobs, options.gpus, options.each, start, **more)  # type: ignore[arg-type]
    if options.back is not None:
        pack(options.out, options.back)
    return failed


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(made)
    add = made.add_argument
    add("--group", choices=GROUPS, help="jobs to run")
    add("--types", nargs="+", choices=[*TYPES], metavar="TYPE", help=f"some layer types only: {', '.join(TYPES)}")
    add("--winner", default="auto", help="layer type of the groups winner and embedded (default: by the rule)")
    add("--winner_from", type=Path, metavar="OUT", help="folder whose results name the winner (default: --out)")
    add("--gpus", nargs="*", default=["0"], help="numbers of GPUs; none is the CPU")
    add("--each", type=int, default=4, help="jobs at a time on a GPU (default: 4)")
    add("--seconds", type=float, help="end after so many")
    add("--train_prompts", type=int, default=PROMPTS, help=f"prompts of stage 2 (default: {PROMPTS})")
    add("--tiny", action="store_true", help="two steps of everything: shows that it runs, and nothing else")
    add("--back", type=Path, metavar="FOLDER", help="keep what there is in parts of less than 16 MiB here")
    add("--pack", type=Path, metavar="FOLDER", help="only write --back, of this folder")
    add("--unpack", type=Path, metavar="FOLDER", help="only put the parts of this folder into --out")
    add("--table", action="store_true", help="print the arms")
    add("--report", action="store_true", help="write the video part of results/lit.json")
    add("--embedded", type=Path, metavar="OUT", help="with --report: folder of the group embedded")
    add("--docs", action="store_true", help="with --report: write the tables of docs/lit_video.md")
    add("-o", "--output", default="lit", help="with --report: name or path of the result file")
    return made


def job_words(options: argparse.Namespace) -> list[str]:
    """Return the options that every job gets."""
    words = ["--model", str(options.model), "--out", str(options.out), "--device", options.device]
    for name in ("prompts", "max_steps", "batch", "transfer_steps", "transfer_prompts"):
        words += [f"--{name}", str(getattr(options, name))]
    for name in SIZES:
        words += [f"--{name}", str(getattr(options, name))] if getattr(options, name) else []
    return words + (["--two"] if options.two else [])


def main(argv: Sequence[str] | None = None) -> int:
    """Run, pack or report."""
    options = parser().parse_args(argv)
    try:
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
                raise UserError("--pack needs --back, a folder for the parts")
            else:
                print(*pack(options.pack, options.back), sep="\n")
        elif options.report:
            lit_video_report.write(options.out, options.embedded, options.output, docs=options.docs)
        elif options.group is None:
            raise UserError(f"say what to do: --group ({', '.join(GROUPS)}), --report, --table, --pack or --unpack")
        else:
            return 1 if run(options, job_words(options)) else 0
    except UserError as error:
        print(f"benchmarks.lit_video: {error}", file=sys.stderr)
        return 2
    return 0


__all__ = ["ARMS", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
