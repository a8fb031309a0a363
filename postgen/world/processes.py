"""A function over many parts, by processes that do not import the program which started them.

Those of `multiprocessing` do ("spawn"), and a script without `if __name__ == "__main__":` then runs again in each of
them and fails in words of its own. What goes to and fro is pickled, as there, and leaves no file.
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
"""Processes that are worth their start, 2 s of importing torch."""
_PROGRAM = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer);"
    " from postgen.world.processes import _serve; _serve()"
)


def spread(
    task: Callable[[Part], Result], parts: Sequence[Part], what: str, *, workers: int | None = None
) -> list[Result]:
    """Return what a function gives for each part, in their order.

    Args:
        task: a function of a module, or a `partial` of one; not of a script.
        parts: each as long as the others.
        what: the processes do, for messages: "draws scenes".
        workers: how many; None: one for each core, shared with torchrun's other processes, and none for a few.

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
    # In a session of its own: Ctrl-C is for this process, which ends it.
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def _told(process: subprocess.Popen[bytes], task: Any, parts: Any) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it died, which its answer tells
        process.stdin.write(pickle.dumps(sys.path) + pickle.dumps((task, parts)))
        process.stdin.close()


def _answer(process: subprocess.Popen[bytes], what: str) -> list[Any]:
    assert process.stdout is not None
    data = process.stdout.read()
    if not data or process.wait():
        raise UserError(
            f"a process that {what} ended with exit code {process.wait()}: look above for why, or for what killed it,"
            " perhaps a lack of memory"
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
    """Do the parts of stdin, and write their results, or what failed, to stdout."""
    jobs, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever is printed must not get among the answers
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
        os._exit(0)  # nobody is left to hear it; a plain return would try to write the rest again
