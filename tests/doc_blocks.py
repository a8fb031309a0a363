"""Run the code blocks of a page in their order: Python in one namespace, shell commands in this process.

A block runs as it is printed, except for the changes of the tables in `tests.doc_swaps`: they replace names of the
user's files and of models on the Hub, and append options with smaller sizes, so that a command takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.docs_blocks import ROOT, Block, blocks_of_page
from tests.apps.served import serving
from tests.doc_swaps import BEFORE, SERVERS, SWAPS, smaller

TAGGED_PROGRAMS = ("make", "pip", "python3", "bash", "torchrun")
"""Commands that are never run here. A block with such a command needs a `no-run` tag."""


class Page:
    """A page that runs in the current folder, which contains the embedded model as `postgen/assets/tiny-wan`."""

    def __init__(self, page: Path) -> None:
        self.page = page
        self.blocks = [block for block in blocks_of_page(page) if block.no_run is None]
        self.names: dict[str, Any] = {"__name__": "page"}
        self.swapped: set[str] = set()
        self._servers = contextlib.ExitStack()
        self._urls: dict[str, str] = {}

    def run(self, languages: tuple[str, ...] = ("python", "bash")) -> str:
        """Run the blocks of these languages, and return their output.

        Raises:
            AssertionError: the exit code of a command is not 0, or a row of the table of swaps matches no text.
        """
        Path("postgen").symlink_to(ROOT / "postgen")
        torch.manual_seed(0)
        with self._servers, contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(BEFORE.get(self.page.name, ""), self.names)
            for block in self.blocks:
                if block.language in languages:
                    self._run(block)
        if languages == ("python", "bash"):
            unused = {old for old, _ in SWAPS.get(self.page.name, ())} - self.swapped
            assert not unused, f"tests/doc_swaps.py: {self.page.name} has no {unused}"
        return printed.getvalue()

    def _run(self, block: Block) -> None:
        code = block.code
        for old, new in (*SWAPS.get(self.page.name, ()), *self._urls.items()):
            if old in code:
                self.swapped.add(old)
                code = code.replace(old, new)
        if block.language == "python":
            exec(compile(code, block.place, "exec"), self.names)
            return
        for line in re.sub(r"\\\n", " ", code).splitlines():
            for command in line.split(" && "):
                self._shell(command, block)

    def _shell(self, line: str, block: Block) -> None:
        """Run one command; a shell runs the part after a pipe."""
        first, _, rest = line.partition(" | ")
        words = shlex.split(first, comments=True)
        if not words:
            return
        if "postgen.train" in words or words[:2] == ["accelerate", "launch"]:
            place = next(n for n, word in enumerate(words) if word in ("postgen.train", "postgen"))
            words = ["postgen", "train", *(word for word in words[place + 1 :] if word != "train")]
        program = words[0].removeprefix(".venv/bin/")
        assert program not in TAGGED_PROGRAMS, f"{block.place}: this needs a no-run tag: {line}"
        assert program == "postgen", f"{block.place}: no test runs {line}"
        if words[1] in SERVERS and "--help" not in words:
            self._serve(words[1:])
            return
        said = run_command(smaller(words[1:]), f"{block.place}: {line}")
        if rest:
            subprocess.run(["sh", "-c", rest], input=said, text=True, check=True)

    def _serve(self, words: list[str]) -> None:
        """Start a server on a free port; it runs until the page ends."""
        port = words[words.index("--port") + 1] if "--port" in words else SERVERS[words[0]]
        Path("server").mkdir()
        given = ["-m", "postgen", *words, "--port", "0"]
        server = serving(given, Path("server"), page=words[0] == "demo")
        self._urls[f"http://127.0.0.1:{port}"] = self._servers.enter_context(server).url


def run_command(words: list[str], said_as: str) -> str:
    """Run the command line in this process, and return its output.

    Raises:
        AssertionError: the exit code is not 0.
    """
    from postgen.cli import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(SystemExit) as left, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main(words)
    assert left.value.code in (0, None), f"{said_as}\n(run with {shlex.join(words)})\n{err.getvalue()[-2000:]}"
    return out.getvalue()
