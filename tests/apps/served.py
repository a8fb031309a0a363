"""A program that serves a page, as a process of its own."""

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
"""Seconds that a process has to end by itself."""


def missing() -> str:
    """Return what browser tests lack here; nothing where all is there."""
    lacks = [] if shutil.which("chromium") else ["chromium (as root: bash .ci/browser)"]
    lacks += [f"{name} (pip install 'postgen[demo,dev]')" for name in ("gradio", "playwright") if not find_spec(name)]
    return " and ".join(lacks)


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that answers."""

    url: str
    """Address of its page, without a slash at the end."""
    folder: Path
    """Where it was started."""
    process: subprocess.Popen[bytes]
    """The program."""
    seconds: float
    """From its start to the first answer."""

    @property
    def outputs(self) -> Path:
        """Where the app keeps what it makes."""
        return self.folder / "outputs"

    def said(self) -> str:
        """Return what it has written to both of its outputs."""
        return (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")


@contextmanager
def serving(
    words: Sequence[str | Path], folder: Path, *, seconds: float = 120.0, python: Path | None = None, page: bool = True
) -> Iterator[Served]:
    """Start Python with these words in a folder, give the server, and end it with all its children.

    The program takes a free port itself and prints its address, so no other process can take the port first.

    Args:
        words: after the name of the interpreter.
        folder: where it is started.
        seconds: how long it may take.
        python: another interpreter, which is told nothing of this checkout; None is this one, which is.
        page: wait for its page; without, for the address that it prints.

    Raises:
        AssertionError: it ended, or did not answer in time; the message has what it wrote.
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
    """Nothing is asked of the network, and nothing of another run is found."""
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
    """Return the address that the program has printed, as soon as its page is there, where that is waited for."""
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
    """End a program and what it has started, also what ignores the signal."""
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
