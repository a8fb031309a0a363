"""Python modules run in processes of their own, which need not import torch and diffusers: they are forks of a server.

An import of both takes seconds of a core, and most of what the tests start does little else. What is tested there is
what processes do to each other: that one is killed, that two of them train together. Tests of what is imported, of the
installed program and of an environment that libraries read when they are imported start an interpreter.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_CONTEXT = get_context("forkserver")
# One server for all tests of this process. What cannot be imported there is imported by each of its forks.
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


class Child:
    """A module that runs as `python -m module words` does, in a folder."""

    def __init__(
        self,
        module: str,
        words: Sequence[str | Path],
        variables: Mapping[str, str] | None = None,
        *,
        folder: Path = ROOT,
    ) -> None:
        self._own = tempfile.TemporaryDirectory()
        self._log = Path(self._own.name) / "log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})}
        given = (module, [str(word) for word in words], environment, folder, self._log)
        self._process = _CONTEXT.Process(target=_run, args=given)
        self._process.start()

    @property
    def code(self) -> int | None:
        """The exit code, the negative number of a signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = 300) -> int:
        """Wait for its end and return the exit code.

        Raises:
            TimeoutError: it had to be killed; the message has what it wrote.
        """
        self._process.join(seconds)
        if self.code is None:
            self.kill()
            raise TimeoutError(f"still running after {seconds:g} s:\n{self.said()[-3000:]}")
        return self.code

    def kill(self) -> int:
        """End it with signal 9, if it has not ended; return the exit code."""
        self._process.kill()
        self._process.join()
        assert self.code is not None
        return self.code

    def said(self) -> str:
        """Return what it has written to both of its outputs."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""


def run(module: str, *words: str | Path, variables: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a module to its end; return the exit code and what it wrote."""
    child = Child(module, words, variables)
    return child.wait(), child.said()


def _run(module: str, words: list[str], environment: dict[str, str], folder: Path, log: Path) -> None:
    """What the fork does."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for output in (1, 2):
        os.dup2(file, output)
    # The server hears no Ctrl-C, and the shell may have been told to ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)
