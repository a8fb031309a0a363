"""Two processes (gloo) have equal weights, those of one process with twice the gradient accumulation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from postgen.train import main
from postgen.training import checkpoint
from tests.grpo.toy import SETTINGS, lines_of
from tests.training.pair import run_pair

pytestmark = pytest.mark.slow

RUN = {
    **SETTINGS,
    "method": "tests.grpo.killed:WitnessGRPO",
    "per_device_train_batch_size": 6,
    # Groups of 4 with 6 samples per process span processes.
    "num_generations": 4,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "sde_window_size": 2,
    "max_steps": 3,
    "save_steps": 0,
    "eval_steps": 3,
    "ema_decay": 0.0,
    "bf16": False,
    "report_to": "none",
}
ACCUMULATED = {"gradient_accumulation_steps": 2, "steps_per_generation": 4}
ONE_UPDATE = {"steps_per_generation": 1}
ACCUMULATED_ONCE = {"gradient_accumulation_steps": 2, "steps_per_generation": 2}
REPLAYED = {"policy_loss": "dppo", "dppo_delta": 1e-6, "old_log_prob": "replay", "rollout_batch_size": 4}
SCORES = {"reuse_graph": "reweight", "rollout_batch_size": 1}
BEST = {"best_of_n": 2, "sde_window_per": "sample"}
ADVANTAGES = {
    # Groups of 8 with 12 samples per process span processes.
    **{"method": "tests.grpo.killed:ClipGRPO", "num_frames": 4, "num_generations": 8, "motion_residual": 0.7},
    **{"scale_rewards": "max", "advantage_clip_per": "reward", "loss_per": "reward", "advantage_clip": 1.0},
    **{"shuffle_advantages": True, "reward_weights": [1.0, 0.5], "per_device_train_batch_size": 12},
}
# The reference and the EMA weights are swapped in between the updates.
SHARDED = {"sde_window_per": "rollout", "ema_decay": 0.9, "beta": 0.1, "eval_steps": 1}
# Clips are made by both processes; 5 clips in files of 3 make one process draw a file less.
BRAKES = {
    **{"data_beta": 0.5, "data_source": "samples", "data_clips": 5, "eval_fm_clips": 3, "rollout_batch_size": 3},
    # Adam makes steps of the size of the rate from nearly zero gradients, and so also from their rounding.
    **{"norm_guard": 1.0, "sde_window_per": "rollout", "learning_rate": 3e-3},
}
TWO_AND_ONE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "groups span processes": ({}, ACCUMULATED),
    "best of n": ({"per_device_train_batch_size": 4, **BEST}, {"per_device_train_batch_size": 8, **BEST}),
    "all of the advantages": (ADVANTAGES, {**ACCUMULATED, **ADVANTAGES}),
    "mask and replay": (REPLAYED, {**ACCUMULATED, **REPLAYED}),
    "retained graphs": ({**ONE_UPDATE, "reuse_graph": "retain"}, {**ACCUMULATED_ONCE, "reuse_graph": "retain"}),
    "score gradients": ({**ONE_UPDATE, **SCORES}, {**ACCUMULATED_ONCE, **SCORES}),
    "fully sharded": ({"fully_shard": True, **SHARDED}, {**ACCUMULATED, **SHARDED}),
    "brakes": (BRAKES, {**ACCUMULATED, **BRAKES}),
    "brakes fully sharded": ({"fully_shard": True, **BRAKES}, {**ACCUMULATED, **BRAKES}),
}
"""Name -> settings of the run in two processes, and of the equivalent run in one process."""
VIDEO = {"LoRA": True, "all weights": False}
"""Name of a run of a video model -> its `use_peft`."""


def settings_of_a_video_model(model: Path, prompts: Path, use_peft: bool) -> dict[str, Any]:
    return {
        "method": "dancegrpo", "model": str(model), "fully_shard": True, "use_peft": use_peft, "lora_r": 2,
        "train_dataset": str(prompts), "eval_dataset": str(prompts), "reward_funcs": ["tests.grpo.toy.near"],
        "height": 16, "width": 16, "num_frames": 5, "num_generations": 2, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "num_inference_steps": 3, "max_sequence_length": 16, "learning_rate": 1e-2,
        "max_steps": 2, "save_steps": 1, "eval_steps": 1, "sde_window_size": 1, "sde_window_per": "rollout",
        "save_total_limit": None, "beta": 0.1 if use_peft else 0.0, "ema_decay": 0.9, "logging_steps": 1, "bf16": True,
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip


def write(folder: Path, name: str, **values: Any) -> Path:
    """Write a recipe whose run is the folder `name`; return the recipe's path."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**values, "device": "cpu", "output_dir": str(folder / name)}), encoding="utf-8")
    return path


def trained(name: str, folder: Path) -> None:
    assert main([str(folder / f"{name}.yaml")]) == 0


JOBS = [partial(trained, name) for name in (*TWO_AND_ONE, *VIDEO, *(f"{name} resumed" for name in VIDEO))]
"""Jobs that two processes run one after another, because starting processes takes longer than all runs."""


@pytest.fixture(scope="module")
def pair(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one run for each job."""
    folder = tmp_path_factory.mktemp("pair")
    for name, (two, _) in TWO_AND_ONE.items():
        write(folder, name, **{**RUN, **two})
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "a ball"}\n{"prompt": "a cube"}\n')
    for name, use_peft in VIDEO.items():
        values = settings_of_a_video_model(tiny_wan, prompts, use_peft)
        write(folder, name, **values)
        write(folder, f"{name} resumed", **values, resume_from_checkpoint=str(folder / name / "checkpoint-1"))
    run_pair("tests.grpo.test_processes:JOBS", folder)
    return folder


def alone(folder: Path, name: str, **changes: Any) -> Path:
    """Train in this process; return the folder of the run."""
    assert main([str(write(folder, name, **{**RUN, **changes}))]) == 0
    return folder / name


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the initial weights."""
    still = alone(tmp_path_factory.mktemp("still"), "run", max_steps=1, learning_rate=1e-12)
    return load_file(still / "rank-0.safetensors")


@pytest.mark.parametrize("name", TWO_AND_ONE)
def test_grpo_two_processes_do_what_one_does(
    pair: Path, start: dict[str, torch.Tensor], tmp_path: Path, name: str
) -> None:
    run = pair / name
    zero, other = (load_file(run / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(zero[key], other[key]) for key in zero)
    single = alone(tmp_path, "one", **TWO_AND_ONE[name][1])
    expected = load_file(single / "rank-0.safetensors")
    assert max((zero[key] - expected[key]).abs().max() for key in zero) <= 1e-6
    assert max((start[key] - expected[key]).abs().max() for key in zero) >= 1e-3
    assert [found.name for found in checkpoint.find(run)] == ["checkpoint-3"]
    rows, lone = lines_of(run), lines_of(single)
    keys = ("reward", "eval_reward", "frac_reward_zero_std", "eval_diversity/picture", "data_loss", "eval_fm_loss")
    rewards = sorted({key for row in lone for key in row if key.startswith("rewards/")})
    assert len(rewards) >= 4  # failed, group_std, mean and std of each reward
    for key in (*keys, "norm_ratio", *rewards):
        both = ([row[key] for row in found if key in row] for found in (rows, lone))
        assert next(both) == pytest.approx(next(both), abs=1e-5), key


@pytest.mark.parametrize("name", VIDEO)
def test_grpo_sharded_video_model_resumes_and_exports(tiny_wan: Path, pair: Path, name: str) -> None:
    from diffusers import DiffusionPipeline, WanTransformer3DModel

    straight, resumed = pair / name, pair / f"{name} resumed"
    assert not (resumed / "checkpoint-1").exists()
    for kind in ("weights", "ema", "optimizer"):
        left, right = (run / "checkpoint-2" / f"{kind}.safetensors" for run in (straight, resumed))
        assert left.read_bytes() == right.read_bytes(), kind
    if VIDEO[name]:
        DiffusionPipeline.from_pretrained(tiny_wan).load_lora_weights(straight / "export")
    else:
        model = WanTransformer3DModel.from_pretrained(straight / "export" / "transformer")
        average = load_file(straight / "checkpoint-2" / "ema.safetensors")
        assert all(torch.equal(value, average[f"transformer.{key}"]) for key, value in model.named_parameters())
