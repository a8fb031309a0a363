"""Runs `interpreted_*.py` in a process with TRITON_INTERPRET=1, which Triton reads when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

FILES = sorted(path.name for path in HERE.glob("interpreted_*.py"))
LONGEST = "interpreted_linear_attention.py"
PARTS = {"linear_attention": [LONGEST], "the others": [name for name in FILES if name != LONGEST]}
"""Name -> the files of one process. Two processes take about equally long; starting one per file would take longer."""


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_kernels_in_the_interpreter(part: str) -> None:
    pytest.importorskip("triton")
    words = [
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        *(str(HERE / each) for each in PARTS[part]),
    ]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *words, *(HERE / name for name in PARTS[part])],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
