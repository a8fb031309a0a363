"""Commands that need one another, several side by side on each GPU, until all are done or a deadline has come.

A later call starts interrupted commands again; a command that saves checkpoints then resumes by itself. A job that
fails stops no other job. Whatever ends the queue, a signal too, first sends SIGTERM to the running commands, so that
they save what they have.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from postgen.errors import named_error
from postgen.interrupts import held

_LOOK = 0.2
"""Seconds between two looks at the processes."""
_GRACE = 45.0
TICK = 30.0
"""Seconds between two calls of `tick`."""
_THREADS = "2"
"""Of each command on the CPU, where the environment does not say how many."""
Running = tuple["Job", str, subprocess.Popen[bytes]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One command. Whether it is done is said by its mark or by its check; it has one of them."""

    name: str
    command: tuple[str, ...]
    log: Path
    """What it prints."""
    mark: Path | None = None
    """A file that is written here after the command has ended well."""
    check: Callable[[], bool] | None = None
    """Whether what the command itself leaves behind is there."""
    needs: tuple[str, ...] = ()
    """Names of jobs that must be done before."""
    prepare: Callable[[], None] | None = None
    """Called in this process before the command starts."""
    keep_log: bool = True
    """Whether a later try adds to the log; otherwise it replaces it."""

    def __post_init__(self) -> None:
        assert (self.mark is None) != (self.check is None), f"{self.name} needs a mark or a check"

    @property
    def done(self) -> bool:
        """Whether it has run to its end."""
        if self.check is not None:
            return self.check()
        return self.mark is not None and self.mark.exists()


def wanted(jobs: Mapping[str, Job], goals: Sequence[str]) -> list[Job]:
    """Return the jobs that are not done and that goals which are not done need, in the order of `jobs`."""
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
    """Return the places of `run_jobs` for `each` commands at a time on every GPU; no GPU is the CPU."""
    return [gpu for _ in range(each) for gpu in (gpus or [""])]


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
    """Run jobs, earlier ones first, as soon as what they need is done.

    Args:
        jobs: what they need is among them, or done.
        places: a GPU for each command that may run at a time; "" leaves what it sees as it is.
        seconds: after which what runs is told to stop (SIGTERM), and nothing is begun; 0 is no limit.
        tick: called now and then, and at the end, also of an interrupted call; an error of an earlier call than the
            last is printed and raised no further.
        every: seconds between two calls of `tick`.
        environment: added to that of the commands.
        grace: seconds that commands have to save what they did, once they are told to stop.
        go_on: whether others still begin after one has failed.

    Returns:
        The names of jobs that are not done, and why: "failed", "needs NAME", "stopped", "not begun".
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
                break  # nothing else can begin
            if time.monotonic() - ticked > every:
                _try(tick)
                ticked = time.monotonic()
            time.sleep(_LOOK)
    finally:
        with held():  # a second signal does not cut short what the first one began
            left |= _stopped(running, grace)
            left |= {job.name: "not begun" for job in waiting}
            tick()
    return left


def told(left: Mapping[str, str]) -> list[str]:
    """Print what `run_jobs` has not done, and return the names of what failed."""
    for name, why in left.items():
        if why != "failed":
            print(f"{name}: not done", flush=True)
    return [name for name, why in left.items() if why == "failed"]


def _next(waiting: list[Job], running: Sequence[Running], left: dict[str, str]) -> Job | None:
    """Take the first job that may begin from those that wait; those that need what is lost are lost too."""
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
    """Mark what has ended, and free its places."""
    for each in [each for each in running if each[2].poll() is not None]:
        with held():  # a job that has ended is marked, or still counts as running
            running.remove(each)
            free.append(each[1])
            _ended(each[0], each[2].returncode, left)


def _begin(job: Job, free: list[str], running: list[Running], left: dict[str, str], more: Mapping[str, str]) -> None:
    """Start a job in the first free place. A job that cannot start counts as failed; the others go on."""
    try:
        if job.prepare is not None:
            job.prepare()
        with held():  # a command that was started always counts as running
            running.append((job, free[0], _started(job, free[0], more)))
            free.pop(0)
    except Exception as error:  # of this job alone, whatever it is
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
        # In a process group of its own: Ctrl-C, and what `timeout` sends to a group, then reach a command once, from
        # here. A second signal would end a training at once, without a checkpoint.
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
    except Exception as error:  # a disk that is full for a while stops nothing that runs
        print(f"the results cannot be written now, {named_error(error)}", flush=True)


def _mark(job: Job, code: int) -> None:
    if code == 0 and job.mark is not None:
        with suppress(OSError):  # the disk is full: the next call runs the job again, which finds nothing left to do
            job.mark.parent.mkdir(parents=True, exist_ok=True)
            job.mark.touch()


def _ended(job: Job, code: int, left: dict[str, str]) -> None:
    _mark(job, code)
    if not job.done:
        left[job.name] = "failed"
    print(f"{job.name}: {'done' if job.done else f'failed, see {job.log} (exit code {code})'}", flush=True)


def _stopped(running: Sequence[Running], grace: float) -> dict[str, str]:
    """Stop what runs, and return what is not done."""
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
