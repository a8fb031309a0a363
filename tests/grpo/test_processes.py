"""Two processes (gloo) do what one does with twice the accumulation, and hold the same weights."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from postgen.train import main
from postgen.training import checkpoint
from tests.grpo.toy import SETTINGS, lines_of
from tests.training.test_processes import launch

RUN = {
    **SETTINGS,
    "method": "tests.grpo.killed:WitnessGRPO",
    "per_device_train_batch_size": 6,
    # Groups of 4 in parts of 6: they span processes.
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


def alone(folder, **changes):
    import yaml

    folder.mkdir()
    path = folder / "recipe.yaml"
    values = {**RUN, "output_dir": str(folder / "run"), **changes}
    path.write_text(yaml.safe_dump(values))
    assert main([str(path)]) == 0
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("two", "one"),
    [
        ({}, {"gradient_accumulation_steps": 2, "steps_per_generation": 4}),
        (
            {"per_device_train_batch_size": 4, "best_of_n": 2, "sde_window_per": "sample"},
            {"per_device_train_batch_size": 8, "best_of_n": 2, "sde_window_per": "sample"},
        ),
        (
            # The reference and the average stand in the model between the updates.
            {"fully_shard": True, "sde_window_per": "rollout", "ema_decay": 0.9, "beta": 0.1, "eval_steps": 1},
            {
                "gradient_accumulation_steps": 2,
                "steps_per_generation": 4,
                "sde_window_per": "rollout",
                "ema_decay": 0.9,
                "beta": 0.1,
                "eval_steps": 1,
            },
        ),
    ],
    ids=["groups span processes", "best of n", "fully sharded"],
)
def test_grpo_two_processes_do_what_one_does(tmp_path, two, one):
    _, done = launch(tmp_path / "two", **{**RUN, **two})
    assert done.returncode == 0, done.stderr
    run = tmp_path / "two" / "run"
    zero, other = (load_file(run / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(zero[name], other[name]) for name in zero)
    single = alone(tmp_path / "one", **one)
    expected = load_file(single / "rank-0.safetensors")
    start = load_file(alone(tmp_path / "still", max_steps=1, learning_rate=1e-12) / "rank-0.safetensors")
    assert max((zero[name] - expected[name]).abs().max() for name in zero) <= 1e-6
    assert max((start[name] - expected[name]).abs().max() for name in zero) >= 1e-3
    assert [found.name for found in checkpoint.find(run)] == ["checkpoint-3"]
    rows, lone = lines_of(run), lines_of(single)
    for name in ("reward", "eval_reward", "frac_reward_zero_std"):
        both = ([row[name] for row in found if name in row] for found in (rows, lone))
        assert next(both) == pytest.approx(next(both), abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", [True, False])
def test_grpo_sharded_video_model_resumes_and_exports(tiny_wan, tmp_path, use_peft):
    from diffusers import DiffusionPipeline, WanTransformer3DModel

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a ball"}\n{"prompt": "a cube"}\n')
    values = {
        "method": "dancegrpo", "model": str(tiny_wan), "fully_shard": True, "use_peft": use_peft, "lora_r": 2,
        "train_dataset": str(prompts), "eval_dataset": str(prompts), "reward_funcs": ["tests.grpo.toy.near"],
        "height": 16, "width": 16, "num_frames": 5, "num_generations": 2, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "num_inference_steps": 3, "max_sequence_length": 16, "learning_rate": 1e-2,
        "max_steps": 2, "save_steps": 1, "eval_steps": 1, "sde_window_size": 1, "sde_window_per": "rollout",
        "save_total_limit": None, "beta": 0.1 if use_peft else 0.0,
    }  # fmt: skip
    _, done = launch(tmp_path / "straight", **values)
    assert done.returncode == 0, done.stderr
    straight, resumed = tmp_path / "straight" / "run", tmp_path / "resumed" / "run"
    shutil.copytree(straight / "checkpoint-1", resumed / "checkpoint-1")
    _, done = launch(tmp_path / "resumed", **values, resume_from_checkpoint="latest")
    assert done.returncode == 0, done.stderr
    for name in ("weights", "ema", "optimizer"):
        left, right = (run / "checkpoint-2" / f"{name}.safetensors" for run in (straight, resumed))
        assert left.read_bytes() == right.read_bytes(), name
    if use_peft:
        DiffusionPipeline.from_pretrained(tiny_wan).load_lora_weights(straight / "export")
    else:
        model = WanTransformer3DModel.from_pretrained(straight / "export" / "transformer")
        average = load_file(straight / "checkpoint-2" / "ema.safetensors")
        assert all(torch.equal(value, average[f"transformer.{key}"]) for key, value in model.named_parameters())
