"""Processes of the judge next to the calling process: started once, reused, and ended together with the caller."""

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
    """A process of the judge ended during its work: it was killed, or memory ran out."""


class Pool:
    """A number of processes; one thread per job passes the job to an idle process and waits for the answer."""

    def __init__(self, workers: int) -> None:
        self.processes = [_Process() for _ in range(workers)]
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        for process in self.processes:
            self._idle.put(process)
        self._closed = False
        self.users = 0
        """Number of running calls; `_lock` protects it."""

    def submit(self, sight: Sight, scenes: Sequence[Spec | Reading]) -> list[Future[list[Report]]]:
        """Start to judge clips (at least one), in parts of equal size (the last may be smaller), one for each process.

        Returns:
            One future per part with the reports of its clips, in the order of the clips; short lists have fewer parts
            than processes. A future raises `WorkerDied` if its process was killed or the pool was closed before.
        """
        step = -(-len(sight) // len(self.processes))
        jobs = []
        for low in range(0, len(sight), step):
            jobs.append(Future[list[Report]]())
            work = (jobs[-1], sight.part(low, low + step), scenes[low : low + step])
            # Not an executor: Python waits for an executor's threads at exit, before anything can end the processes.
            threading.Thread(target=self._judge, args=work, name="judge", daemon=True).start()
        return jobs

    def _judge(self, job: Future[list[Report]], sight: Sight, scenes: Sequence[Spec | Reading]) -> None:
        process = self._idle.get()
        try:
            if self._closed:
                raise WorkerDied("the judge was closed before it reached this clip: call it again")
            job.set_result(process.judge(sight, scenes))
        except Exception as error:
            job.set_exception(error)
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End the processes at once; unfinished jobs fail."""
        self._closed = True
        for process in self.processes:
            process.end()


class _Process:
    def __init__(self) -> None:
        # The process has its own session, so a keyboard interrupt reaches only the calling process.
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
                "a lack of memory; workers=0 judges without other processes."
            ) from error
        if "error" in answer:
            raise _error(**answer)
        return [Report.from_dict(report) for report in answer["reports"]]

    def end(self, grace: float = 0.0) -> int:
        """Wait up to `grace` seconds for the process to end, then kill it; return its exit code."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            # Unsent data of a job raises the error again.
            with suppress(OSError):
                _pipe(pipe).close()
        return self._process.wait()


def _error(error: str, message: str, trace: str) -> Exception:
    """Return the error of a process as an exception, of the same class if the class is built in."""
    kind = getattr(builtins, error, None)
    found = kind(message) if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError(message)
    found.add_note(f"In a process of the judge:\n{trace}")
    return found


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "opened as a pipe"
    return stream


# The key contains the process id: a forked process must not use the pipes of its parent.
_pools: dict[tuple[int, int], Pool] = {}
_lock = threading.Lock()


@contextmanager
def pool_of(workers: int) -> Iterator[Pool]:
    """Yield the pool with the given number of processes; the first use starts it.

    An interrupt, or the death of a process, ends the pool. Calls of other threads that use the pool finish first; the
    last of them ends the processes.
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
        under_way: also end pools that are in use, whose calls then fail. Otherwise the last such call ends its pool.
    """
    with _lock:
        for key in [key for key in _pools if key[0] == os.getpid()]:
            pool = _pools.pop(key)
            if under_way or not pool.users:
                pool.close()


# A running call in another thread must not delay the exit of the calling process.
atexit.register(close_pools, under_way=True)
