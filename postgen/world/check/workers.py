"""Processes that judge beside this one: started once, kept, and gone when this one is."""

from __future__ import annotations

import atexit
import builtins
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from postgen.world.check.report import Report
from postgen.world.check.sight import Sight
from postgen.world.reading import Reading
from postgen.world.spec import Spec

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class WorkerDied(RuntimeError):
    """A process of the judge ended in the middle of its work: it was killed, or there was no memory left."""


class Pool:
    """So many processes, and a thread for each that hands it jobs and waits for the answers."""

    def __init__(self, workers: int) -> None:
        self.processes = [_Process() for _ in range(workers)]
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        for process in self.processes:
            self._idle.put(process)
        self._closed = False
        self.users = 0
        """Calls under way, counted under the lock of the table of pools."""

    def submit(self, sight: Sight, scenes: Sequence[Spec | Reading]) -> list[Future[list[Report]]]:
        """Begin to judge clips, an equal number in each process; results in their order, or `WorkerDied`."""
        step = -(-len(sight) // len(self.processes))
        jobs = []
        for low in range(0, len(sight), step):
            jobs.append(Future[list[Report]]())
            work = (jobs[-1], sight.part(low, low + step), scenes[low : low + step])
            # Of no executor: Python waits for its threads at the end, before anything can end the processes.
            threading.Thread(target=self._judge, args=work, name="judge", daemon=True).start()
        return jobs

    def _judge(self, job: Future[list[Report]], sight: Sight, scenes: Sequence[Spec | Reading]) -> None:
        process = self._idle.get()
        try:
            if self._closed:
                raise WorkerDied("the judge was ended before it came to this clip")
            job.set_result(process.judge(sight, scenes))
        except Exception as error:
            job.set_exception(error)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End the processes at once; jobs that are not done fail."""
        self._closed = True
        for process in self.processes:
            process.end()


class _Process:
    def __init__(self) -> None:
        # In a session of its own, so that an interrupt from the keyboard is this process's business alone.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **_ONE_THREAD},
            start_new_session=True,
        )
        self.pid = self._process.pid

    def judge(self, sight: Sight, scenes: Sequence[Spec | Reading]) -> list[Report]:
        rows, spots = sight.rows_NC.tobytes(), sight.spots_MSC.tobytes()
        job = {
            "bytes": len(rows),
            "spot_bytes": len(spots),
            "spot_shape": sight.spots_MSC.shape[1:],
            "columns": sight.rows_NC.shape[1],
            "count": sight.count_BF.tolist(),
            "height": sight.height,
            "width": sight.width,
            "likeness": sight.likeness,
            "film": sight.film,
            "asked": [(Reading.of(one) if isinstance(one, Spec) else one).to_dict() for one in scenes],
        }
        try:
            _pipe(self._process.stdin).write(json.dumps(job).encode() + b"\n" + rows + spots)
            _pipe(self._process.stdin).flush()
            answer = json.loads(_pipe(self._process.stdout).readline())
        except (OSError, ValueError) as error:
            raise WorkerDied(
                f"process {self.pid} of the judge died (exit code {self.end(1.0)}): look for what killed it, perhaps "
                "a lack of memory; workers=0 judges in this process."
            ) from error
        if "error" in answer:
            raise _error(**answer)
        return [Report.from_dict(report) for report in answer["reports"]]

    def end(self, grace: float = 0.0) -> int:
        """Kill it if it lives for so many seconds more; its exit code."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            # What a job had left to write breaks once more.
            with suppress(OSError):
                _pipe(pipe).close()
        return self._process.wait()


def _error(error: str, message: str, trace: str) -> Exception:
    """The error of a process, of its own kind where that is built in."""
    kind = getattr(builtins, error, None)
    found = kind(message) if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError(message)
    found.add_note(f"In a process of the judge:\n{trace}")
    return found


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "opened as a pipe"
    return stream


# By process too: one that is forked must not talk to its parent's.
_pools: dict[tuple[int, int], Pool] = {}
_lock = threading.Lock()


@contextmanager
def pool_of(workers: int) -> Iterator[Pool]:
    """The pool with that many processes, started at its first use; ended after an interrupt, or when one died.

    Calls of other threads that are under way finish first: the last of them ends the processes.
    """
    key = (os.getpid(), workers)
    with _lock:
        if key not in _pools:
            _pools[key] = Pool(workers)
        pool = _pools[key]
        pool.users += 1
    broken = False
    try:
        yield pool
    except BaseException as error:
        broken = isinstance(error, WorkerDied) or not isinstance(error, Exception)
        raise
    finally:
        with _lock:
            pool.users -= 1
            if broken and _pools.get(key) is pool:
                del _pools[key]
            last = not pool.users and _pools.get(key) is not pool
        if last:
            pool.close()


def close_pools(*, under_way: bool = False) -> None:
    """End all processes of the judge; a later call starts new ones.

    Args:
        under_way: end also those that have work, which then fails; else the call that is under way ends its own.
    """
    with _lock:
        for key in [key for key in _pools if key[0] == os.getpid()]:
            pool = _pools.pop(key)
            if under_way or not pool.users:
                pool.close()


# A call in another thread must not hold up the end of this process.
atexit.register(close_pools, under_way=True)
