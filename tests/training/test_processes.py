"""Two processes on one machine (gloo): equal weights with different data, one checkpoint with both RNG states."""

import os
import subprocess
import sys
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from postgen.errors import UserError
from postgen.train import main
from postgen.training import checkpoint, load_recipe
from tests.training.pair import run_pair

ROOT = Path(__file__).resolve().parents[2]


def recipe(folder, **settings):
    """Write a recipe whose run is in the folder; return the path of the recipe."""
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
    return path


def trained(name, folder):
    with (folder / f"{name}-{os.environ['RANK']}.txt").open("w") as log, redirect_stderr(log):
        code = main([str(folder / name / "recipe.yaml")])
        print(f"ended with {code}", file=log)


def apart(folder):
    with pytest.raises(RuntimeError) as caught:
        trained("apart", folder)
    (folder / f"caught-{os.environ['RANK']}.txt").write_text(str(caught.value))


JOBS = [partial(trained, "straight"), partial(trained, "resumed"), apart]
"""Jobs that the two processes run one after another."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    recipe(folder / "straight", save_steps=1, logging_steps=3, save_total_limit=None)
    recipe(folder / "resumed", save_steps=1, logging_steps=3, save_total_limit=None, resume_from_checkpoint="latest")
    recipe(folder / "apart", raw_pass=True, max_steps=1)
    # The link is valid once the first job has ended.
    (folder / "resumed" / "run").mkdir()
    (folder / "resumed" / "run" / "checkpoint-1").symlink_to(folder / "straight" / "run" / "checkpoint-1")
    run_pair("tests.training.test_processes:JOBS", folder)
    return folder


def said(folder, name):
    return [(folder / f"{name}-{rank}.txt").read_text() for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_learn_the_same(tmp_path):
    """Two processes started by accelerate's launcher, with the config file that recipes name, train equal weights."""
    path = recipe(tmp_path, device="auto")
    config = ROOT / "recipes" / "accelerate" / "ddp_cpu.yaml"
    words = ["accelerate.commands.launch", "--config_file", str(config), "-m", "postgen.train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
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
def test_two_processes_resume_exactly(pair):
    assert all(text.endswith("ended with 0\n") for name in ("straight", "resumed") for text in said(pair, name))
    assert "resumed from" in said(pair, "resumed")[0]
    straight, resumed = (pair / name / "run" for name in ("straight", "resumed"))
    for name in ("weights", "ema", "optimizer", "rank-0", "rank-1"):
        left, right = (run / "checkpoint-3" / f"{name}.safetensors" for run in (straight, resumed))
        assert left.read_bytes() == right.read_bytes(), name


@pytest.mark.slow
def test_processes_that_learn_apart_are_caught(pair):
    assert all("the processes hold different weights" in text for text in said(pair, "caught"))
    assert not list((pair / "apart" / "run").glob("checkpoint-*"))
