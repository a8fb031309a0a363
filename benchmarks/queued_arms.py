"""Command lines of experiments whose arms are trained and measured by a queue of jobs: options, GPUs, exit code."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import job_queue
from benchmarks.lit_video_files import pack_files
from postgen.errors import UserError

GRACE = 40.0
"""Seconds between the signal to stop and the end of a run, in which it finishes its update and saves."""


def add_places(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options about folders; `out` is the default output folder."""
    parser.add_argument("--out", type=Path, default=Path(out), help="output folder")
    parser.add_argument(
        "--back", type=Path, metavar="FOLDER", help="keep the measurements here, in files of less than 16 MiB"
    )
    parser.add_argument(
        "--unpack", type=Path, metavar="FOLDER", help="first restore what --back has kept in this folder"
    )


def add_queue(parser: argparse.ArgumentParser, arms: str, seeds: Sequence[int]) -> None:
    """Add the options of the queue, with the default arms and seeds."""
    add = parser.add_argument
    add("--arms", nargs="+", default=[arms], metavar="ARM", help="arms or groups of arms (see table)")
    add("--seeds", nargs="+", type=int, default=list(seeds), help="seeds of the training")
    add("--gpus", nargs="*", default=["0"], help="numbers of the GPUs; no number for the CPU")
    add("--each", type=int, default=4, help="jobs at the same time on a GPU (default: 4)")
    add("--seconds", type=float, default=0.0, help="save and end after this time; 0: no limit")
    add("--tiny", action="store_true", help="tiny sizes, only to show that everything runs")


def add_report(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options of a report; `name` is the default name of the result."""
    parser.add_argument("-o", "--output", default=name, help="name or path of the result")
    parser.add_argument("--docs", action="store_true", help="write the tables of the pages")


def words_of(options: argparse.Namespace) -> list[str]:
    """Return the options that every job of the queue gets."""
    words = ["--out", str(options.out), *(["--tiny"] if options.tiny else [])]
    return [*words, *([] if options.gpus else ["--device", "cpu"])]


def check_gpus(gpus: Sequence[str]) -> None:
    """Check that torch finds the GPUs; on the CPU, the sizes of the experiment would take days.

    Raises:
        UserError: there is no GPU of one of the numbers.
    """
    import torch

    count = torch.cuda.device_count()
    missing = [gpu for gpu in gpus if not (gpu.isdigit() and int(gpu) < count)]
    if missing and (not count or "CUDA_VISIBLE_DEVICES" not in os.environ):
        raise UserError(
            f"--gpus has {missing[0]}, but torch finds {count} CUDA devices: give other numbers, or --gpus without a"
            " number and --tiny to test the benchmark on a CPU"
        )


def run_queue(options: argparse.Namespace, jobs: Sequence[job_queue.Job], tick: Callable[[], None]) -> int:
    """Run the jobs on the GPUs of the command line.

    Args:
        options: has `gpus`, `each` and `seconds`.
        jobs: the unfinished jobs.
        tick: called now and then, and at the end.

    Returns:
        The exit code: 0 if all is done, 1 if a job failed, 3 if the command has to be repeated.
    """
    places = job_queue.places_on(options.gpus, options.each)
    left = job_queue.run_jobs(jobs, places, seconds=options.seconds, tick=tick, grace=GRACE)
    failed = job_queue.told(left)
    print(f"{len(jobs) - len(left)} of {len(jobs)} jobs done", flush=True)
    return 1 if failed else 3 if left else 0


def keep(options: argparse.Namespace, files: Callable[[Path], Iterable[Path]]) -> None:
    """Bring measurements back, if `--back` is given and there are any.

    Args:
        options: has `out` and `back`.
        files: returns the files of an output folder to bring back, the most important ones first.
    """
    if options.back is not None and (found := [*files(options.out)]):
        pack_files(found, options.out, options.back)
