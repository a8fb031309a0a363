"""A run that is killed at any point and resumed ends with bitwise the weights of an uninterrupted run."""

import json
import random
import shutil
import signal
import time

import pytest
import yaml

from postgen.grpo.nft import DiffusionNFTTrainer
from postgen.train import main
from postgen.training import checkpoint
from tests.children import Child
from tests.grpo.toy import SETTINGS, grpo

PARTS = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors")
STEPS = 9
# A rollout has two updates, and checkpoints follow odd numbers of updates, so also the middle of a rollout.
RUN = {
    **SETTINGS,
    "method": "tests.grpo.killed:KilledGRPO",
    "steps_per_generation": 2,
    "sde_window_size": 2,
    "ratio_norm": True,
    "epsilon": 1e-3,
    "max_steps": STEPS,
    "save_steps": 3,
    "eval_steps": 4,
    "eval_prompts": 4,
    "ema_decay": 0.9,
    "save_total_limit": None,
    "report_to": "none",
}


def recipe(folder, **changes):
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RUN, "output_dir": str(folder / "run"), **changes}))
    return path


def start(path, *words):
    return Child("postgen.train", (path, *words))


def parts(folder, step=STEPS):
    return {name: (folder / "run" / f"checkpoint-{step}" / name).read_bytes() for name in PARTS}


def metrics(folder):
    clock = ("step_time", "seconds", "timing/", "transformer_seconds")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(part in k for part in clock)} for row in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight") / "a"
    assert main([str(recipe(folder))]) == 0
    return folder


def test_grpo_resumes_exactly_after_a_kill_at_each_point(straight, tmp_path):
    points = {"rollout": 6, "reward": 4, "update": 7, "checkpoint": 6}
    paths = {point: recipe(tmp_path / point) for point in points}
    killed = {point: start(paths[point], "--kill_at", point, "--kill_step", str(points[point])) for point in points}
    for point, process in killed.items():
        assert process.wait(120) == -signal.SIGKILL, process.said()
        left = [found.name for found in checkpoint.find(tmp_path / point / "run")]
        expected = ["checkpoint-3"] if points[point] <= 6 and point != "rollout" else ["checkpoint-3", "checkpoint-6"]
        assert left == expected, point
        assert main([str(paths[point]), "--resume"]) == 0
        assert parts(tmp_path / point) == parts(straight), point
        assert metrics(tmp_path / point) == metrics(straight), point
        assert not list((tmp_path / point / "run").glob(".*.part"))


@pytest.mark.slow
def test_grpo_resumes_exactly_after_kills_at_random_moments(straight, tmp_path):
    steps = 90
    changes = {"max_steps": steps, "save_steps": 7, "eval_steps": 20}
    assert main([str(recipe(tmp_path / "straight", **changes))]) == 0
    path, chance = recipe(tmp_path / "killed", **changes), random.Random(0)
    folder = tmp_path / "killed" / "run"

    def logged() -> object:
        lines = folder / "metrics.jsonl"
        return lines.stat().st_mtime_ns if lines.is_file() else 0

    def saved() -> object:
        return {each.name for each in folder.glob("checkpoint-*")}

    # Every second process is killed after a checkpoint, so that the run advances even on a slow machine.
    for progress in (logged, saved) * 2:
        process, seen = start(path, "--resume", "auto"), progress()
        while process.code is None and progress() == seen:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        assert process.kill() == -signal.SIGKILL, process.said()
    assert main([str(path), "--resume"]) == 0
    assert parts(tmp_path / "killed", steps) == parts(tmp_path / "straight", steps)


def test_grpo_nft_resumes_exactly_with_its_old_policy(tmp_path):
    def run(name, **changes):
        values = {"kind": DiffusionNFTTrainer, "steps_per_generation": 2, "save_steps": 1, "save_total_limit": None}
        grpo(tmp_path / name / "run", max_steps=5, ema_decay=0.9, old_decay_rate=0.1, **values, **changes).train()

    run("straight")
    shutil.copytree(tmp_path / "straight" / "run" / "checkpoint-3", tmp_path / "resumed" / "run" / "checkpoint-3")
    run("resumed", resume_from_checkpoint="latest")
    assert parts(tmp_path / "resumed", 5) == parts(tmp_path / "straight", 5)


def test_grpo_evaluates_a_checkpoint_alone(straight, tmp_path):
    path = recipe(tmp_path / "a", eval_dataset="x")
    found = straight / "run" / f"checkpoint-{STEPS}"
    assert main([str(path), "--init_from", str(found), "--evaluate_only", "true"]) == 0
    rows = metrics(tmp_path / "a")
    assert len(rows) == 1
    assert rows[0]["eval_reward"] > -2
    assert not list((tmp_path / "a" / "run").glob("checkpoint-*"))
