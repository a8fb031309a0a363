"""Processes that draw scenes: any script can start them, they end with it, and their errors reach it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from postgen.errors import UserError
from postgen.world.processes import spread

SCRIPT = """
print("the script runs")
from functools import partial
from postgen.world import sample_long
from postgen.world.processes import spread

draw = partial(sample_long, num_frames=9)
print(spread(draw, [0, 1, 2], "draws scenes", workers=2) == [draw(seed) for seed in (0, 1, 2)])
"""


def test_a_script_without_a_guard_starts_them(tmp_path: Path) -> None:
    """A script without `if __name__ == "__main__"` must work; `multiprocessing` would run it again in each process."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, env=os.environ, timeout=300
    )
    assert (done.stdout, done.returncode) == ("the script runs\nTrue\n", 0), done.stderr


def test_what_fails_there_is_told_here() -> None:
    with pytest.raises(ValueError, match="math domain error"):
        spread(math.sqrt, [4.0, -1.0], "takes roots", workers=1)
    with pytest.raises(UserError, match="a process that leaves ended with exit code 3"):
        spread(os._exit, [3], "leaves", workers=1)


def test_few_parts_are_done_here() -> None:
    assert spread(lambda number: (number, os.getpid()), [1, 2], "counts") == [(1, os.getpid()), (2, os.getpid())]
