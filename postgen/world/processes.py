"""Apply a function to many parts in several processes, which do not import the main program.

The processes of `multiprocessing` ("spawn") do import it: a script without `if __name__ == "__main__":` then runs
again in each process and fails with an unrelated message. Tasks and results are pickled over pipes, as in
`multiprocessing`, and leave no file.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from postgen.errors import UserError

Part = TypeVar("Part")
Result = TypeVar("Result")
_FEWEST = 4
"""Smallest number of processes that is worth the 2 s in which each imports torch."""
_PROGRAM = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer);"
    " from postgen.world.processes import _serve; _serve()"
)


def spread(
    task: Callable[[Part], Result], parts: Sequence[Part], what: str, *, workers: int | None = None
) -> list[Result]:
    """Return the results of a function for each part, in the order of the parts.

    Args:
        task: a function of a module, or a `partial` of one; a function of a script does not work.
        parts: the arguments; each should take about the same time.
        what: what a process does, for error messages: "draws scenes".
        workers: number of processes. None: one per core, divided by the number of torchrun's processes on this
            machine, and at most one per part; if that gives fewer than four, the calling process does the work itself.

    Raises:
        UserError: a process was killed.
    """
    if workers is None:
        workers = min(len(parts), (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        workers = 0 if workers < _FEWEST else workers
    if not workers:
        return [task(part) for part in parts]
    found: list[Any] = [None] * len(parts)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(workers):
            processes.append(_started())
        for number, process in enumerate(processes):
            _told(process, task, parts[number::workers])
        for number, process in enumerate(processes):
            found[number::workers] = _answer(process, what)
    finally:
        for process in processes:
            _end(process)
    return found


def _started() -> subprocess.Popen[bytes]:
    # The process has its own session, so Ctrl-C reaches this process only, which then ends the other one.
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def _told(process: subprocess.Popen[bytes], task: Any, parts: Any) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # the process died; reading its answer reports that
        process.stdin.write(pickle.dumps(sys.path) + pickle.dumps((task, parts)))
        process.stdin.close()


def _answer(process: subprocess.Popen[bytes], what: str) -> list[Any]:
    assert process.stdout is not None
    data = process.stdout.read()
    if not data or process.wait():
        raise UserError(
            f"a process that {what} ended with exit code {process.wait()}: look for its error message above, or for"
            " what killed it, perhaps a lack of memory"
        )
    answer = pickle.loads(data)
    if isinstance(answer, BaseException):
        raise answer
    results: list[Any] = answer
    return results


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()
    process.wait()


def _serve() -> None:
    """Read the task and its parts from stdin; write the results, or the exception, to stdout."""
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # printed text must not mix with the answers
    task, parts = pickle.load(jobs)
    answer: list[Any] | Exception
    try:
        answer = [task(part) for part in parts]
    except Exception as error:
        answer = error
    try:
        answers.write(pickle.dumps(answer))
        answers.flush()
    except BrokenPipeError:
        os._exit(0)  # no reader is left; a plain return would try to write the rest again
