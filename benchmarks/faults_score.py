"""Measure the peak memory of `postgen score` for a video of 10,000 frames.

    python -m benchmarks.faults_score

The video is a true clip of the synthetic world, 96x96, played forwards and backwards until it has 10,000 frames. Each
row is one run of the command in its own process. Ten times per second the benchmark adds up the resident sets of this
process and of all its descendants (for example ffmpeg). The peak is the largest sum. It runs on Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from postgen import world, write_video

FRAMES = 10_000
REWARDS = (
    "world",  # the default
    "motion_floor,brightness_band,sharpness_band,vbench_flicker",
    "world_clip,world_judge,brisque(least=64)",
    "flow_smoothness,dynamic_degree",
)
"""Rewards that are computed together in one run. The largest peak of the runs counts."""
TOTAL = 2**20


def tree_mb(root: int) -> float:
    """Return the sum of the resident sets of a process and all its descendants, in MB (2**20 bytes)."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # the process has just ended
    total = 0
    for pid in parents:
        one = pid
        while one not in (root, 0) and one in parents:
            one = parents[one]
        if one == root:
            try:
                # Between fork and exec, a child shares the pages of its parent and has the same command line. These
                # pages must not count twice.
                twin = pid != root and _words(pid) == _words(parents[pid])
                total += 0 if twin else int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except OSError:
                continue
    return total * os.sysconf("SC_PAGE_SIZE") / TOTAL


def _words(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def make_video(path: Path, frames: int = FRAMES) -> str:
    """Write the video with `frames` frames; return its prompt."""
    spec = world.sample(7, camera="static")
    clip = world.render([spec]).rgb_BF3HW[0]

    def played() -> Iterator[Tensor]:
        for number in range(frames):
            place = number % (2 * len(clip) - 2)
            yield clip[place if place < len(clip) else 2 * len(clip) - 2 - place]

    write_video(path, played(), fps=16)
    return world.simple_caption(spec)


def peak_of(video: Path, prompt: str, rewards: str) -> dict[str, Any]:
    """Score a video; return the rewards, their scores, the seconds and the peak memory."""
    table = video.with_suffix(".jsonl")
    table.unlink(missing_ok=True)
    command = [sys.executable, "-m", "postgen", "score", str(video), "--prompt", prompt, "--reward", rewards]
    start, peak = time.perf_counter(), 0.0
    with subprocess.Popen([*command, "-o", str(table)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None:
            peak = max(peak, tree_mb(run.pid))
            time.sleep(0.1)
    if run.returncode:
        raise RuntimeError(f"the command `{' '.join(command)}` ended with exit code {run.returncode}")
    row = json.loads(table.read_text())
    scores = {key: value for key, value in row.items() if key not in ("file", "prompt", "no_score", "error", "key")}
    seconds = time.perf_counter() - start
    return {"rewards": rewards, "scores": scores, "seconds": round(seconds, 1), "peak_mb": round(peak, 1)}


def by_rewards(frames: int = FRAMES) -> list[dict[str, Any]]:
    """Measure each entry of `REWARDS` and return one row per entry."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder, "long.mp4")
        prompt = make_video(video, frames)
        for rewards in REWARDS:
            rows.append({"frames": frames, **peak_of(video, prompt, rewards)})
            print(f"{rewards}: {rows[-1]['peak_mb']:.0f} MB, {rows[-1]['seconds']:.0f} s, {rows[-1]['scores']}")
    return rows


if __name__ == "__main__":
    by_rewards(*map(int, sys.argv[1:]))
