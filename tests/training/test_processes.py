"""Two processes on one machine (gloo): equal weights from different data, one checkpoint, both random states."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from postgen.errors import UserError
from postgen.training import checkpoint, load_recipe

ROOT = Path(__file__).resolve().parents[2]


def launch(folder, **settings):
    folder.mkdir(exist_ok=True)
    values = {
        "method": "tests.training.tiny:WitnessTrainer",
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "ema_decay": 0.9,
        "eval_steps": 3,
        "logging_steps": 1,
        "bf16": True,
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    config = ROOT / "recipes" / "accelerate" / "ddp_cpu.yaml"
    words = ["accelerate.commands.launch", "--config_file", str(config), "-m", "postgen.train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    return path, done


@pytest.mark.slow
def test_two_processes_learn_the_same(tmp_path):
    path, done = launch(tmp_path, device="auto")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    zero, one = (load_file(run / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert not torch.equal(zero.pop("data"), one.pop("data"))
    assert all(torch.equal(zero[name], one[name]) for name in zero)
    assert [found.name for found in checkpoint.find(run)] == ["checkpoint-3"]
    states = checkpoint.read(run / "checkpoint-3").ranks
    assert len(states) == 2
    assert not torch.equal(states[0]["rng.generator"], states[1]["rng.generator"])
    assert not torch.equal(states[0]["rng.torch"], states[1]["rng.torch"])
    trainer, config = load_recipe(
        path, ["--resume_from_checkpoint", "latest", "--bf16", "false", "--allow_changed", "bf16"]
    )
    with pytest.raises(UserError, match="was written by 2 processes, this run has 1"):
        trainer(config).train()


@pytest.mark.slow
def test_two_processes_resume_exactly(tmp_path):
    launch(tmp_path / "straight", save_steps=1, logging_steps=3, save_total_limit=None)
    straight, resumed = (tmp_path / name / "run" for name in ("straight", "resumed"))
    shutil.copytree(straight / "checkpoint-1", resumed / "checkpoint-1")
    _, done = launch(tmp_path / "resumed", save_steps=1, logging_steps=3, resume_from_checkpoint="latest")
    assert done.returncode == 0, done.stderr
    for name in ("weights", "ema", "optimizer", "rank-0", "rank-1"):
        left, right = (run / "checkpoint-3" / f"{name}.safetensors" for run in (straight, resumed))
        assert left.read_bytes() == right.read_bytes(), name


@pytest.mark.slow
def test_processes_that_learn_apart_are_caught(tmp_path):
    _, done = launch(tmp_path, raw_pass=True, max_steps=1)
    assert done.returncode != 0
    assert "the processes hold different weights" in done.stderr
    assert not list((tmp_path / "run").glob("checkpoint-*"))
