"""Wrong input or an error in one of two processes (gloo): both end within seconds, with one line of the first."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from benchmarks.launches import ROOT, free_ports
from tests.children import Child
from tests.grpo.toy import SETTINGS

pytestmark = pytest.mark.slow

SECONDS = 20.0
"""Limit of the time between the ends of the two processes; a launcher kills a process only after 30 s."""


def recipe(folder: Path, **changes: object) -> Path:
    values = {**SETTINGS, "method": "tests.grpo.bad_ranks:BadGRPO", "num_generations": 4, "num_inference_steps": 4}
    values |= {"per_device_train_batch_size": 4, "max_steps": 3, "save_steps": 1, "report_to": "none"}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "output_dir": str(folder / "run"), **changes}), encoding="utf-8")
    return path


def pair(path: Path) -> tuple[list[int], list[list[str]]]:
    """Train a recipe in two processes; return their exit codes and the lines that each has printed about errors."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    shared |= {"MASTER_PORT": str(free_ports(1)[0])}
    both = [Child("postgen.train", (path,), {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    end = time.monotonic() + 120
    while time.monotonic() < end and all(each.code is None for each in both):
        time.sleep(0.05)
    codes = [each.wait(SECONDS) for each in both]
    lines = [[line for line in each.said().splitlines() if line.startswith("postgen: ")] for each in both]
    return codes, lines


@pytest.mark.parametrize(
    ("bad", "codes", "message"),
    [
        (
            "column",
            [2, 2],
            "process 1: the reward counting needs the column 'number', the data has no columns",
        ),
        ("rows", [2, 2], "process 1 has another value of train_dataset than process 0: all processes of a run need"),
        ("user", [2, 2], "process 1: no such thing: do that"),
        ("bug", [1, 1], "process 1: RuntimeError: no way (its traceback is in the output)"),
        ("killed", [1, -9], "another process of this run has ended without a message (killed, or out of memory)"),
    ],
)
def test_what_is_wrong_in_one_process_is_told_once_and_ends_both(tmp_path, bad, codes, message):
    found, (first, second) = pair(recipe(tmp_path, bad=bad))
    assert found == codes
    assert len(first) == 1
    assert first[0].startswith(f"postgen: error: {message}")
    assert second == []
    if bad in ("column", "rows"):
        assert not list(tmp_path.glob("run/*"))


def test_a_batch_that_does_not_divide_and_another_batch_in_a_resume_are_told_once(tmp_path):
    codes, lines = pair(recipe(tmp_path, num_generations=5))
    assert codes == [2, 2]
    assert lines[1] == []
    assert len(lines[0]) == 1
    assert "4 x 2 processes x 1 micro-batches): this must be a multiple of num_generations, which is 5" in lines[0][0]
    assert pair(recipe(tmp_path))[0] == [0, 0]
    codes, lines = pair(recipe(tmp_path, gradient_accumulation_steps=2, resume_from_checkpoint="latest"))
    assert codes == [2, 2]
    assert lines[1] == []
    assert len(lines[0]) == 1
    assert "gradient_accumulation_steps: 1 -> 2. These settings change what is learned" in lines[0][0]


def test_torchrun_ends_when_one_process_fails(tmp_path):
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "postgen.train"]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *words, str(recipe(tmp_path, bad="user"))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("postgen: ")]
    assert lines == ["postgen: error: process 1: no such thing: do that"]
    assert "SIGKILL" not in done.stderr
    assert time.monotonic() - began < 100
