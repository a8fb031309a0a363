"""Commands that need one another, several side by side on each GPU, until all are done or a deadline has come.

A job is done when its mark is there, which is written after its command has ended well: whatever was interrupted is
begun again by the next call, and goes on by itself where its command knows how to. What fails takes nothing else with
it, and whatever ends the queue, a signal too, tells what runs to save what it did (SIGTERM).
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
_GRACE = 45.0
"""Seconds that commands have to save what they did, after the deadline."""
TICK = 30.0
"""Seconds between two calls of `tick`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One command."""

    name: str
    command: tuple[str, ...]
    mark: Path
    """Is there when it is done."""
    log: Path
    """What it prints; a later try adds to it."""
    needs: tuple[str, ...] = ()
    """Names of jobs that must be done before."""
    prepare: Callable[[], None] | None = None
    """Called in this process before the command starts."""
    marked: bool = True
    """Whether the mark is written here; False where the command itself writes that file last."""

    @property
    def done(self) -> bool:
        """Whether it has run to its end."""
        return self.mark.exists()


Running = tuple[Job, str, subprocess.Popen[bytes]]
"""A job, its place, its process."""


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


def run_jobs(
    jobs: Sequence[Job],
    places: Sequence[str],
    *,
    seconds: float = 0.0,
    tick: Callable[[], None] = lambda: None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Run jobs, earlier ones first, as soon as what they need is done.

    Args:
        jobs: what they need is among them, or done.
        places: a GPU for each command that may run at a time; "" is the CPU.
        seconds: after which what runs is told to stop (SIGTERM), and nothing is begun; 0 is no limit.
        tick: called now and then, and at the end; what it raises before that is only told.
        environment: added to that of the commands.

    Returns:
        The names of jobs that are not done, and why: "failed", "needs NAME", "stopped", "not begun".
    """
    assert places, "no job could ever begin"
    waiting, free = list(jobs), list(places)
    running: list[Running] = []
    left: dict[str, str] = {}
    began = ticked = time.monotonic()
    try:
        while waiting or running:
            if seconds and time.monotonic() - began > seconds:
                break
            _see_ends(running, free, left)
            _begin(waiting, free, running, left, environment or {})
            if time.monotonic() - ticked > TICK:
                _try(tick)
                ticked = time.monotonic()
            time.sleep(_LOOK)
    finally:
        with held():  # a second signal does not cut short what the first one began
            left |= _stopped(running)
            left |= {job.name: "not begun" for job in waiting}
            tick()
    return left


def _see_ends(running: list[Running], free: list[str], left: dict[str, str]) -> None:
    """Mark what has ended, and free its places."""
    for each in [each for each in running if each[2].poll() is not None]:
        with held():  # what has ended is marked, or still known to run
            running.remove(each)
            free.append(each[1])
            _ended(each[0], each[2].returncode, left)


def _begin(
    waiting: list[Job], free: list[str], running: list[Running], left: dict[str, str], more: Mapping[str, str]
) -> None:
    """Start what can be in the free places. What cannot begin is told and left: others go on."""
    for job in list(waiting):
        if lost := [name for name in job.needs if name in left]:
            left[job.name] = f"needs {lost[0]}"
            waiting.remove(job)
        elif free and not _open(job, waiting, running):
            waiting.remove(job)
            try:
                if job.prepare is not None:
                    job.prepare()
                with held():  # what was started is known to run
                    running.append((job, free[0], _started(job, free[0], more)))
                    free.pop(0)
            except Exception as error:  # of this job alone, whatever it is
                print(f"{job.name}: cannot begin, {named_error(error)}", flush=True)
                left[job.name] = "failed"


def _open(job: Job, waiting: Sequence[Job], running: Sequence[Running]) -> bool:
    """Whether something that a job needs is still to be done."""
    todo = {each.name for each in waiting} | {each.name for each, *_ in running}
    return bool(todo & set(job.needs))


def _started(job: Job, place: str, more: Mapping[str, str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **more}
    if place:
        environment["CUDA_VISIBLE_DEVICES"] = place
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        # In a group of its own: Ctrl-C, and what `timeout` sends to a group, come once, from here. A second signal
        # would end a training at once, without a checkpoint.
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
        print(f"what there is cannot be written now, {named_error(error)}", flush=True)


def _ended(job: Job, code: int, left: dict[str, str]) -> None:
    if code == 0 and job.marked:
        with suppress(OSError):  # of a disk that is full: it is done again, which finds nothing left to do
            job.mark.parent.mkdir(parents=True, exist_ok=True)
            job.mark.touch()
    if not job.done:
        left[job.name] = "failed"
    print(f"{job.name}: {'done' if job.done else f'failed with exit code {code}, see {job.log}'}", flush=True)


def _stopped(running: Sequence[Running]) -> dict[str, str]:
    """Stop what runs, and return it."""
    for *_, process in running:
        process.terminate()
    end, left = time.monotonic() + _GRACE, {}
    for job, _, process in running:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        found: dict[str, str] = {}
        if process.returncode == 0:
            _ended(job, 0, found)
        if not job.done:
            left[job.name] = "stopped"
    return left
