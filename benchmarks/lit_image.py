"""LiT's five guidelines on images (arXiv:2501.12976): train the arms of the experiment, measure them, write a report.

    python -m benchmarks.lit_image --out runs/lit-image --gpus 0 1 --seconds 520 --results OUT
    python -m benchmarks.lit_image --out runs/lit-image --report --docs

The teacher is a small DiT on pixels (`recipes/tiny-dit.yaml`), trained on stills of the world. In each arm, a student
with linear attention is trained for a fifth of the teacher's steps (`recipes/lit-tiny-dit.yaml`). Several runs are
trained at the same time on each GPU. The command skips finished runs and continues interrupted ones, so repeat it
until its exit code is 0. Every half minute it writes the results so far to the folder RESULTS: `measures.json`,
`sheet.webp`, `progress.json`, and `part-0.tar.gz`, from which `--unpack RESULTS` restores the measurements to continue
on another machine. Trained weights are not kept, so the teachers of the students that are left are trained again; to
avoid this, run all arms of a seed on one machine (`--seeds`). `--report` converts `measures.json` to the part `image`
of `results/lit.json`; `--docs` also writes the tables of docs/lit_results.md. `--tiny` only tests on a CPU that
everything runs. `--table` prints the arms.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import lit_image_report
from benchmarks.command import ended
from benchmarks.job_queue import Job, lock_of, places_on, run_jobs, wanted
from benchmarks.lit_image_arms import (
    ALL_ARMS,
    ARMS,
    FULL,
    SEEDS,
    SHORT,
    TEACHERS,
    TINY,
    TRUTH,
    all_jobs,
    names_of,
)
from benchmarks.lit_image_folder import all_measured, check_folder, kept_files
from benchmarks.lit_video_files import pack_files, unpack
from postgen.errors import UserError, check_number
from postgen.files import replacing


def train(options: argparse.Namespace) -> dict[str, str]:
    """Run the unfinished jobs; return the jobs that are still unfinished, with the reason for each.

    Raises:
        UserError: invalid options, another command that works in the folder, or a folder of another experiment.
    """
    _check_options(options)
    # Recipes contain this path, and another spelling of it would count as another run.
    options.out = options.out.absolute()
    size = TINY if options.tiny else SHORT if options.short else FULL
    if options.no_graphs:
        size = replace(size, teacher={**size.teacher, "cuda_graphs": False})
    names = [TRUTH, *names_of(options.arms or ALL_ARMS, options.seeds)]
    jobs = all_jobs(names, options.out, size)
    places = places_on(options.gpus, options.each)
    results = options.results or options.out
    if options.unpack is not None:
        unpack(options.unpack, options.out)

    def tick() -> None:
        collect(options.out, results, jobs)

    with lock_of(options.out):
        check_folder(options.out, results, jobs, size)
        todo = _ordered(wanted(jobs, [f"measure {name}" for name in names]))
        # Threads wait without spinning. On a busy machine, spinning threads made a measurement of 10 s take minutes.
        waits = os.environ.get("OMP_WAIT_POLICY", "passive")
        environment = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": waits}
        return run_jobs(todo, places, seconds=options.seconds, tick=tick, environment=environment)


def _check_options(options: argparse.Namespace) -> None:
    for name, least in (("threads", 1), ("seconds", 0)):
        check_number(f"--{name}", getattr(options, name), least)
    for seed in options.seeds:
        check_number("--seeds", seed, 0, 2**31 - 1)
    for name in ("seeds", "arms"):
        if len(set(given := getattr(options, name) or [])) < len(given):
            raise UserError(f"--{name} must not repeat a value, got {' '.join(map(str, given))}")


def _ordered(jobs: Sequence[Job]) -> list[Job]:
    """Sort the jobs: teachers first, because students need them; then measurements, so that results appear early."""

    def rank(job: Job) -> int:
        if job.name.split(".")[0] in TEACHERS:
            return 0
        return 1 if job.name == "reference" or job.name.startswith("measure ") else 2

    return sorted(jobs, key=rank)


def collect(out: Path, results: Path, jobs: dict[str, Job]) -> None:
    """Write the results so far to `results`: measurements, progress and the sheet of pictures."""
    results.mkdir(parents=True, exist_ok=True)
    measured = all_measured(out)
    # All runs in the folder count, also those that this call did not select.
    lines = {place.parent.name: _metrics(place) for place in sorted((out / "runs").glob("*/metrics.jsonl"))}
    losses = {name: rows[-1] for name, told in lines.items() if (rows := [row for row in told if "loss" in row])}
    judged = {name: rows for name, told in lines.items() if (rows := [row for row in told if "eval_score" in row])}
    state = {name: "done" if job.done else "not done" for name, job in jobs.items()}
    for place, content in (
        ("measures.json", {"measured": measured, "losses": losses, "judged": judged}),
        ("progress.json", {"jobs": state, "losses": losses}),
    ):
        with replacing(results / place) as part:
            part.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    if measured:
        lit_image_report.sheet(out / "strips", list(measured), results / "sheet.webp")
    if files := [*kept_files(out)]:
        pack_files(files, out, results)


def _metrics(place: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file; skip an incomplete line, which the run is still writing."""
    found = []
    for line in place.read_text(encoding="utf-8").splitlines() if place.is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def table() -> str:
    """Return the arms as a Markdown table."""
    rows = [f"| `{name}` | {what} | |" for name, what in TEACHERS.items()]
    for name, arm in ARMS.items():
        told = {**arm.conversion, **arm.lit, **arm.train}
        words = ", ".join(f"`{key}: {value}`" for key, value in told.items())
        rows.append(f"| `{name}` | {arm.about} | {words} |")
    return "\n".join(["| Arm | | Settings on top of `lit-tiny-dit.yaml` |", "|---|---|---|", *rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure the arms, write the report, or print the table of arms.

    The exit code is 0 if all jobs are finished, 1 if a job failed, 2 after invalid input, and 3 if jobs are left for
    another call. After a signal it is 130, 143 or 129, once all running jobs have saved their state.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lit-image"), help="folder of the experiment")
    parser.add_argument("--results", type=Path, help="folder for the results to keep (default: OUT)")
    parser.add_argument("--unpack", type=Path, metavar="RESULTS", help="first restore what another machine measured")
    parser.add_argument(
        "--arms", nargs="+", choices=[*TEACHERS, *ARMS], metavar="ARM", help="arms to run (default: all)"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[*SEEDS], help="seeds of the training")
    parser.add_argument("--gpus", nargs="*", default=["0"], help="numbers of the GPUs; no number for the CPU")
    parser.add_argument("--each", type=int, default=3, help="jobs at the same time on a GPU (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each job (default: 2)")
    parser.add_argument("--no_graphs", action="store_true", help="train the teachers without CUDA graphs")
    parser.add_argument("--seconds", type=float, default=0.0, help="save and end after this time; 0: no limit")
    tries = parser.add_mutually_exclusive_group()
    tries.add_argument("--tiny", action="store_true", help="a tiny experiment, to test on a CPU that everything runs")
    tries.add_argument("--short", action="store_true", help="few steps and pictures, to test that a GPU runs it")
    parser.add_argument("--report", action="store_true", help="write the result file from RESULTS/measures.json")
    parser.add_argument(
        "--docs", action="store_true", help="with --report: also write the tables and the sheet of the docs"
    )
    parser.add_argument("-o", "--output", default="lit", help="with --report: name or path (.json) of the result file")
    parser.add_argument("--table", action="store_true", help="print the arms")
    options = parser.parse_args(argv)
    return ended("benchmarks.lit_image", partial(_do, options))


def _do(options: argparse.Namespace) -> int:
    if options.docs and not options.report:
        raise UserError("--docs needs --report: give both")
    if options.table:
        print(table())
    elif options.report:
        lit_image_report.report(options.results or options.out, options.output, docs=options.docs)
    else:
        left = train(options)
        for name, why in left.items():
            print(f"{name}: {why}")
        return 1 if "failed" in left.values() else 3 if left else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
