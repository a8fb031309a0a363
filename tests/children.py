"""Run Python modules in separate processes that are forks of a server, which has already imported torch and diffusers.

Importing both takes seconds, which is most of the time of the processes that the tests start. Use this module to test
interactions of processes: one is killed, or two of them train together. Tests of imports, of the installed program,
and of environment variables that libraries read on import need a new interpreter instead.
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
# One server for all tests of this process. Each fork imports the modules that the server cannot import.
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


class Child:
    """Process that runs `python -m module words` in a folder."""

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
        """Exit code, or negative number of the signal that ended the process; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = 300) -> int:
        """Wait until the process ends, and return the exit code.

        Raises:
            TimeoutError: the process took too long and was killed; the message contains its output.
        """
        self._process.join(seconds)
        if self.code is None:
            self.kill()
            raise TimeoutError(f"still running after {seconds:g} s:\n{self.said()[-3000:]}")
        return self.code

    def kill(self) -> int:
        """Kill the process with signal 9 if it still runs, and return the exit code."""
        self._process.kill()
        self._process.join()
        assert self.code is not None
        return self.code

    def said(self) -> str:
        """Return the text that the process has written to standard output and standard error."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""


def run(module: str, *words: str | Path, variables: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a module to its end, and return the exit code and the output."""
    child = Child(module, words, variables)
    return child.wait(), child.said()


def _run(module: str, words: list[str], environment: dict[str, str], folder: Path, log: Path) -> None:
    """Run the module in the fork."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for output in (1, 2):
        os.dup2(file, output)
    # The server ignores Ctrl-C, and the shell that started the tests may ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[1:] = words
    runpy.run_module(module, run_name="__main__", alter_sys=True)
