"""Start a program that serves a page as a separate process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
_URL = re.compile(r"http://127\.0\.0\.1:\d+")
_PATIENCE = 10.0
"""Seconds that a process has to end after a signal, before it is killed."""


def missing() -> str:
    """Return the programs and packages that browser tests need and that are missing; "" if none is missing."""
    lacks = [] if shutil.which("chromium") else ["chromium (as root: bash .ci/browser)"]
    lacks += [f"{name} (pip install 'postgen[demo,dev]')" for name in ("gradio", "playwright") if not find_spec(name)]
    return " and ".join(lacks)


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running server that answers requests."""

    url: str
    """Address of its page, without a slash at the end."""
    folder: Path
    """Working directory of the server."""
    process: subprocess.Popen[bytes]
    """Process of the server."""
    seconds: float
    """Seconds from the start to the first answer."""

    @property
    def outputs(self) -> Path:
        """Folder of outputs of the app."""
        return self.folder / "outputs"

    def said(self) -> str:
        """Return the text that the server has written to stdout and stderr."""
        return (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")


@contextmanager
def serving(
    words: Sequence[str | Path], folder: Path, *, seconds: float = 120.0, python: Path | None = None, page: bool = True
) -> Iterator[Served]:
    """Start Python with arguments in a folder, yield the server, and end it with all its child processes.

    The program chooses a free port itself and prints its address, so no other process can take the port first.

    Args:
        words: arguments of the interpreter.
        folder: working directory.
        seconds: most seconds until the server answers.
        python: another interpreter, which does not get this checkout on its path; None means the current interpreter
            with this checkout.
        page: whether to wait for the page; otherwise only for the printed address.

    Raises:
        AssertionError: the program ended, or did not answer in time; the message contains its output.
    """
    begin = time.monotonic()
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [python or sys.executable, *map(str, words)],
            cwd=folder,
            env=_environment(folder, checkout=python is None),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = _answering(process, folder / "server.log", begin + seconds, page)
        yield Served(url=url, folder=folder, process=process, seconds=time.monotonic() - begin)
    finally:
        _end(process)


def _environment(folder: Path, *, checkout: bool) -> dict[str, str]:
    """Return an environment without network access to model hubs, and without traces of other runs."""
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    own = {
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "TMPDIR": str(temporary),
        "no_proxy": "127.0.0.1,localhost",
    }
    left_out = "GRADIO_" if checkout else ("GRADIO_", "PYTHON")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    return kept | own | (paths if checkout else {})


def _answering(process: subprocess.Popen[bytes], log: Path, end: float, page: bool) -> str:
    """Return the address that the program prints; with `page`, wait until the page answers."""
    asking = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < end:
        text = log.read_text(encoding="utf-8", errors="replace")
        assert process.poll() is None, f"the server ended with code {process.returncode}:\n{text[-4000:]}"
        found = _URL.search(text)
        if found and not page:
            return found[0]
        if found:
            with suppress(urllib.error.URLError, ConnectionError, TimeoutError), asking.open(found[0], timeout=5):
                return found[0]
        time.sleep(0.1)
    raise AssertionError(f"the server does not answer:\n{log.read_text(errors='replace')[-4000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and its child processes, and kill those that ignore the signal."""
    family = [process]
    with suppress(psutil.NoSuchProcess):
        mother = psutil.Process(process.pid)
        family = [mother, *mother.children(recursive=True)]
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_PATIENCE)
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
