"""Exactness of `recipes/sft-tiny.yaml` on the CPU, for `python -m benchmarks.sft exact`: resuming changes no bit.

One run is straight. Another one is killed with SIGKILL after its second checkpoint, in the middle of training, and the
same command then continues it. The kill is real, so files that are half written are covered too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.gates import device
from benchmarks.sft_arms import ARMS, Run
from benchmarks.sft_job import TINY_CLIPS
from postgen.info import versions
from postgen.sft.trainer import SftTrainer

FILE = "exact.json"
STEPS, KILLED_AFTER = 12, 2
_LONGEST = 600.0
_SMALL: dict[str, Any] = {"max_steps": STEPS, "save_steps": 1, "save_total_limit": 0, "eval_steps": 4, "device": "cpu"}


def exact(out: Path) -> dict[str, Any]:
    """Compare a straight run with a killed and resumed one for a LoRA and for all weights; write `exact.json`.

    Args:
        out: output folder; its clips are written if there are none.
    """
    place = out / "exact"
    if not (place / "data" / "ready.json").is_file():
        from benchmarks.sft_clips import write_folder

        write_folder(place / "data", device="cpu", **TINY_CLIPS)
    found = {arm: _pair(place, arm) for arm in ("lora_replay", "full_replay")}
    result = {
        "resume_identical": int(all(row["identical"] for row in found.values())),
        "arms": found,
        "steps": STEPS,
        "device": device(),
        "versions": versions(),
        "trainer": SftTrainer.__name__,
    }
    (out / FILE).write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def _pair(place: Path, arm: str) -> dict[str, Any]:
    straight, killed = (Run(arm=arm, seed=seed, out=place, tiny=True) for seed in (0, 1))
    assert arm in ARMS
    ends = []
    for run, kill in ((straight, False), (killed, True)):
        # Both have the seed 0; the number in the name only separates the folders.
        recipe = run.recipe(**{**_SMALL, "seed": 0})
        words = [sys.executable, "-m", "postgen.train", str(recipe), "--resume", "auto"]
        if kill:
            _kill(words, run.folder / f"checkpoint-{KILLED_AFTER}")
            at = max(int(path.name.rpartition("-")[2]) for path in run.folder.glob("checkpoint-[0-9]*"))
        subprocess.run(words, check=True, env=_environment())
        ends.append(load_file(run.folder / f"checkpoint-{STEPS}" / "weights.safetensors"))
    same = all(bool((ends[0][name] == ends[1][name]).all()) for name in ends[0]) and ends[0].keys() == ends[1].keys()
    first = load_file(straight.folder / "checkpoint-1" / "weights.safetensors")
    moved = max(float((ends[0][name] - first[name]).abs().max()) for name in first)
    if not moved:
        raise SystemExit(f"{arm} learned nothing, so the comparison proves nothing")
    if at >= STEPS:
        raise SystemExit(f"{arm} had ended before it was killed, so the comparison proves nothing: remove {place}")
    return {"identical": same, "killed_at": at, "tensors": len(first), "moved": moved}


def _kill(words: list[str], mark: Path) -> None:
    """Start a run and kill it as soon as a checkpoint exists."""
    with subprocess.Popen(words, env=_environment()) as process:
        began = time.monotonic()
        while not mark.is_dir() and process.poll() is None and time.monotonic() - began < _LONGEST:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)


def _environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
