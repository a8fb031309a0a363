"""Exactness of the training of `dancegrpo-tiny` on the CPU, for `python -m benchmarks.dancegrpo exact`.

A resumed run must equal a straight one bit by bit, and a run on two processes a run on one process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.dancegrpo_arms import ROOT
from postgen.training.run_curves import read_metrics

RECIPE = "dancegrpo-tiny"
FILE = "exact.json"
SMALL = {
    **{"device": "cpu", "num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
    **{"steps_per_generation": 2, "num_inference_steps": 3, "num_frames": 5, "guidance_scale": 1.0, "max_steps": 3},
    **{"rollout_batch_size": 2, "eval_steps": 0, "eval_on_start": False, "save_steps": 1, "save_seconds": 0.0},
    **{"report_to": "none", "disable_tqdm": True, "save_total_limit": 9, "height": 32, "width": 32},
    # With so few pixels, samples that share the initial noise have equal scores, and nothing is learned.
    **{"bf16": False, "share_initial_noise": False},
}


def small_recipe(place: Path, **changes: Any) -> Path:
    """Write the recipe of a small run to a folder and return its path."""
    place.mkdir(parents=True, exist_ok=True)
    folder = ROOT / "recipes"
    values = yaml.safe_load((folder / f"{RECIPE}.yaml").read_text(encoding="utf-8"))
    # Relative files are beside the recipe.
    values |= {name: str(folder / values[name]) for name in ("train_dataset", "eval_dataset")}
    values |= {**SMALL, "output_dir": str(place / "run"), **changes}
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def small_run(place: Path, *, processes: int = 1, **changes: Any) -> dict[str, Tensor]:
    """Run three small updates of the embedded model in one or two new processes; return the weights."""
    recipe = small_recipe(place, **changes)
    launch = ["-m", "postgen.train"]
    if processes > 1:
        config = ROOT / "recipes" / "accelerate" / "ddp_cpu.yaml"
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), *launch]
    words = [sys.executable, *launch, str(recipe), "--resume", "auto"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, cwd=ROOT, env=environment)
    return load_file(place / "run" / "checkpoint-3" / "weights.safetensors")


def exact(folder: Path) -> None:
    """Compare a straight run with a resumed one bit by bit, and two processes with one process.

    The one process has twice the gradient accumulation of the two.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        straight = small_run(place / "straight")
        (place / "resumed" / "run").mkdir(parents=True)
        # Resume from checkpoint 1, which lies between the two updates of one rollout.
        shutil.copytree(place / "straight" / "run" / "checkpoint-1", place / "resumed" / "run" / "checkpoint-1")
        resumed = small_run(place / "resumed")
        two = small_run(place / "two", processes=2)
        one = small_run(place / "one", gradient_accumulation_steps=2, steps_per_generation=4)
        for name in ("straight", "one", "two"):
            rows = read_metrics(place / name / "run" / "metrics.jsonl")
            # If all advantages are zero, nothing is learned, and the weights of all runs are equal anyway.
            if not any(row.get("advantage/abs_mean") for row in rows):
                sys.exit(f"the run {name!r} learned nothing, so the comparison proves nothing: change SMALL")
    result = {
        "resume_identical": int(all(bool((straight[key] == resumed[key]).all()) for key in straight)),
        "ranks_max_abs": max(float((two[key] - one[key]).abs().max()) for key in two),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(result))
    print(result)
