"""Made-up results of students, in the form in which the jobs of `benchmarks.lit_video` write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.lit_video_arms import ARMS, timed_plan
from benchmarks.lit_video_measure import Measured


def measured(right: str, moved: float = 1.0) -> Measured:
    count = len(right)
    values = [float(letter) for letter in right]
    return Measured(
        right=[letter == "1" for letter in right], score=values, motion=[moved] * count, psnr=[30.0] * count
    )


def row(job: str, right: str, **more: Any) -> dict[str, Any]:
    """Return the result of a student in the form that a job writes."""
    ours, theirs = measured(right).as_json(), measured("1" * len(right)).as_json()
    share = ARMS[job.split(".")[1]].share
    pairs = {"layer_density": 1 / 9, "plan_density": share / 9 + 1 - share, "psnr": {"value": 30.0}}
    found = {
        "job": job,
        "measured": {"one": ours},
        "teacher": {"one": theirs},
        "right": right,
        "share": share,
        **pairs,
    }
    found |= {"layers": ["softmax", "window_delta"], "timed_as": timed_plan(job.split(".")[0], share)}
    return found | {"adapter_bytes": 2_000_000, "device": "x", "training_seconds": 1.0, "settings": {}, **more}


def put(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write the results of students into a folder."""
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    for each in rows:
        (folder / "jobs" / f"{each['job']}.json").write_text(json.dumps(each))
