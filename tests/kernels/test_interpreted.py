"""Runs `interpreted_*.py` in a process where Triton interprets: its functions choose that when they are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


LONG = "convolutions or lengths or wide"
"""Tests of linear attention that take half of its time."""
PARTS = {path.stem.removeprefix("interpreted_"): (path.name, "") for path in HERE.glob("interpreted_*.py")}
PARTS["linear_attention"] = (PARTS["linear_attention"][0], f"not ({LONG})")
PARTS["linear_attention, the long half"] = (PARTS["linear_attention"][0], LONG)
"""Name -> file, and which of its tests."""


@pytest.mark.slow
@pytest.mark.parametrize("part", sorted(PARTS, reverse=True))
def test_kernels_in_the_interpreter(part: str) -> None:
    pytest.importorskip("triton")
    file, which = PARTS[part]
    words = ["-q", "-x", "-p", "no:cacheprovider", "--import-mode=importlib", str(HERE / file), "-k", which]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
