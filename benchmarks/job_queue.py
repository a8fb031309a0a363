"""A queue of dependent commands that runs several at a time on each GPU until all are done or a deadline is reached.

A later call restarts interrupted commands; a command with checkpoints then resumes from them. A failed job does not
stop other jobs. When the queue ends early, also through a signal, it first sends SIGTERM to the running commands, so
that they can save their results.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from postgen.errors import UserError, check_number, named_error, shown
from postgen.files import check_place
from postgen.interrupts import held
from postgen.locks import FolderLock

_LOOK = 0.2
"""Seconds between two checks of the processes."""
_GRACE = 45.0
TICK = 30.0
"""Seconds between two calls of `tick`."""
SAVE_EVERY, SAVE_GRACE = 60.0, 30.0
"""For jobs whose results are packed: seconds between two calls of `tick`, and for running jobs to end after `seconds`,
in which trainers finish their step and save."""
_THREADS = "2"
"""The value of OMP_NUM_THREADS for each command if the environment does not set it."""
Running = tuple["Job", str, subprocess.Popen[bytes]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One command. Either `mark` or `check` must be given; it determines whether the job is done."""

    name: str
    command: tuple[str, ...]
    log: Path
    """The file for the output of the command."""
    mark: Path | None = None
    """A file that the queue creates after the command has succeeded."""
    check: Callable[[], bool] | None = None
    """Returns whether the outputs of the command exist."""
    needs: tuple[str, ...] = ()
    """The names of the jobs that must be done before this one."""
    prepare: Callable[[], None] | None = None
    """Called in this process before the command starts."""
    keep_log: bool = True
    """Whether a restarted command appends to the log instead of replacing it."""

    def __post_init__(self) -> None:
        assert (self.mark is None) != (self.check is None), f"{self.name} needs a mark or a check"

    @property
    def done(self) -> bool:
        """Whether the job has finished successfully."""
        if self.check is not None:
            return self.check()
        return self.mark is not None and self.mark.exists()


def wanted(jobs: Mapping[str, Job], goals: Sequence[str]) -> list[Job]:
    """Return the unfinished goals and the unfinished jobs that they need, in the order of `jobs`."""
    found: set[str] = set()

    def visit(name: str) -> None:
        if name not in found and not jobs[name].done:
            found.add(name)
            for each in jobs[name].needs:
                visit(each)

    for goal in goals:
        visit(goal)
    return [job for name, job in jobs.items() if name in found]


def places_on(gpus: Sequence[str], each: int) -> list[str]:
    """Return `places` of `run_jobs` for `each` commands at a time on every GPU, or on the CPU if `gpus` is empty.

    Raises:
        UserError: `each` is below 1, or `gpus` repeats a number or has one that is not a single number.
    """
    check_number("--each", each, 1)
    if len(set(gpus)) < len(gpus):
        raise UserError(f"--gpus must not repeat a value, got {' '.join(gpus)}")
    if odd := [gpu for gpu in gpus if "," in gpu or not gpu.strip()]:
        raise UserError(
            f"--gpus got {shown(odd[0])}: separate the numbers by spaces, as in --gpus 0 1, or give none for the CPU"
        )
    return [gpu for _ in range(each) for gpu in (gpus or [""])]


def lock_of(out: Path) -> FolderLock:
    """Create the folder of an experiment, and return the lock that keeps other commands out of it.

    Raises:
        UserError: the folder cannot be written.
    """
    check_place(out, folder=True)
    out.mkdir(parents=True, exist_ok=True)
    return FolderLock(out, setting="--out")


def run_jobs(
    jobs: Sequence[Job],
    places: Sequence[str],
    *,
    seconds: float = 0.0,
    tick: Callable[[], None] = lambda: None,
    every: float = TICK,
    environment: Mapping[str, str] | None = None,
    grace: float = _GRACE,
    go_on: bool = True,
) -> dict[str, str]:
    """Run jobs in their order, each as soon as the jobs that it needs are done.

    Args:
        jobs: the jobs; every job that one of them needs is among them or done.
        places: one GPU index for each command that may run at a time; "" does not restrict the GPUs of a command.
        seconds: the time limit; then running commands get SIGTERM and no other job starts. 0 is no limit.
        tick: called every `every` seconds and at the end, also if the queue is interrupted. An error of the last call
            is raised, an error of an earlier call is printed.
        every: seconds between two calls of `tick`.
        environment: variables that are added to the environment of the commands.
        grace: seconds between SIGTERM and SIGKILL, in which commands can save their results.
        go_on: whether other jobs still start after one has failed.

    Returns:
        The name of each unfinished job and the reason: "failed", "needs NAME", "stopped" or "not begun".
    """
    waiting, free = list(jobs), list(places)
    running: list[Running] = []
    left: dict[str, str] = {}
    began = ticked = time.monotonic()
    try:
        while waiting or running:
            if seconds and time.monotonic() - began > seconds:
                break
            _see_ends(running, free, left)
            while free and (go_on or not left) and (job := _next(waiting, running, left)) is not None:
                print(f"{time.monotonic() - began:5.0f} s: {job.name} begins on {_named(free[0])}", flush=True)
                _begin(job, free, running, left, environment or {})
            if not running:
                break  # no other job can start
            if time.monotonic() - ticked > every:
                _try(tick)
                ticked = time.monotonic()
            time.sleep(_LOOK)
    finally:
        with held():  # a second signal must not interrupt the clean-up after the first one
            left |= _stopped(running, grace)
            left |= {job.name: "not begun" for job in waiting}
            tick()
    return left


def told(left: Mapping[str, str]) -> list[str]:
    """Print the jobs that `run_jobs` stopped or did not start; return the names of the failed jobs."""
    for name, why in left.items():
        if why != "failed":
            print(f"{name}: not done", flush=True)
    return [name for name, why in left.items() if why == "failed"]


def exit_code(left: Mapping[str, str]) -> int:
    """Print as `told`; return 1 if a job failed, 3 if jobs are left for another call, and 0 if all are finished."""
    return 1 if told(left) else 3 if left else 0


def _next(waiting: list[Job], running: Sequence[Running], left: dict[str, str]) -> Job | None:
    """Remove the first job that can start from `waiting` and return it; drop jobs whose requirements have failed."""
    while lost := [(job, name) for job in waiting for name in job.needs if name in left]:
        job, name = lost[0]
        left[job.name] = f"needs {name}"
        waiting.remove(job)
    todo = {each.name for each in waiting} | {each.name for each, *_ in running}
    found = next((job for job in waiting if not todo & {*job.needs}), None)
    if found is not None:
        waiting.remove(found)
    return found


def _see_ends(running: list[Running], free: list[str], left: dict[str, str]) -> None:
    """Record the commands that have ended and free their places."""
    for each in [each for each in running if each[2].poll() is not None]:
        with held():  # a signal must not come between these three steps
            running.remove(each)
            free.append(each[1])
            _ended(each[0], each[2].returncode, left)


def _begin(job: Job, free: list[str], running: list[Running], left: dict[str, str], more: Mapping[str, str]) -> None:
    """Start a job in the first free place. A job that cannot start counts as failed, and other jobs go on."""
    try:
        if job.prepare is not None:
            job.prepare()
        with held():  # a signal must not come between start and record
            running.append((job, free[0], _started(job, free[0], more)))
            free.pop(0)
    except Exception as error:  # any error concerns this job only
        print(f"{job.name}: cannot begin, {named_error(error)}", flush=True)
        left[job.name] = "failed"


def _named(place: str) -> str:
    return f"GPU {place}" if place else "the CPU"


def _started(job: Job, place: str, more: Mapping[str, str]) -> subprocess.Popen[bytes]:
    environment = {"OMP_NUM_THREADS": _THREADS, **os.environ, **more}
    if place:
        environment["CUDA_VISIBLE_DEVICES"] = place
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab" if job.keep_log else "wb") as log:
        # The command gets its own process group, so that Ctrl-C and signals of `timeout` to the group do not reach it
        # directly. The queue sends SIGTERM once; a second signal would end a training without a checkpoint.
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,
        )


def _try(tick: Callable[[], None]) -> None:
    try:
        tick()
    except Exception as error:  # a full disk must not stop the running commands
        print(f"the results cannot be written now, {named_error(error)}", flush=True)


def _mark(job: Job, code: int) -> None:
    if code == 0 and job.mark is not None:
        with suppress(OSError):  # with a full disk the next call runs the job again, which has nothing left to do
            job.mark.parent.mkdir(parents=True, exist_ok=True)
            job.mark.touch()


def _ended(job: Job, code: int, left: dict[str, str]) -> None:
    _mark(job, code)
    if not job.done:
        left[job.name] = "failed"
    print(f"{job.name}: {'done' if job.done else f'failed, see {job.log} (exit code {code})'}", flush=True)


def _stopped(running: Sequence[Running], grace: float) -> dict[str, str]:
    """Stop the running commands; return the unfinished jobs with the reason "stopped"."""
    for *_, process in running:
        process.terminate()
    end, left = time.monotonic() + grace, {}
    for job, _, process in running:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _mark(job, process.returncode)
        if job.done:
            print(f"{job.name}: done", flush=True)
        else:
            left[job.name] = "stopped"
    return left
