"""GRPO on a GPU: accelerate's FSDP2 plug-in with one process, and the ratio of the embedded model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.grpo.test_processes import RUN
from tests.grpo.toy import lines_of

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def launched(folder, config, **values):
    """Run a recipe in one process that accelerate starts; return the folder of the run."""
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**values, "output_dir": str(folder / "run")}))
    file = ROOT / "recipes" / "accelerate" / f"{config}.yaml"
    words = ["accelerate.commands.launch", "--config_file", str(file), "--num_processes", "1"]
    words += ["-m", "postgen.train", str(path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def test_grpo_fsdp2_of_accelerate_does_what_one_process_does(tmp_path):
    """The sharded run trains the weights of the plain run; `ShardedWitnessGRPO` asserts that they are DTensors."""
    values = {**RUN, "device": "cuda", "sde_window_per": "rollout", "ema_decay": 0.9, "save_steps": 1}
    sharded = launched(tmp_path / "fsdp2", "fsdp2", **{**values, "method": "tests.grpo.killed:ShardedWitnessGRPO"})
    plain = launched(tmp_path / "single", "single", **values)
    found, expected = (load_file(run / "rank-0.safetensors") for run in (sharded, plain))
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert lines_of(sharded)[-1]["eval_reward"] == pytest.approx(lines_of(plain)[-1]["eval_reward"], abs=1e-3)


def test_grpo_fsdp2_of_accelerate_trains_and_exports_lora(tiny_wan, tmp_path):
    from diffusers import DiffusionPipeline

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a ball"}\n{"prompt": "a cube"}\n')
    run = launched(
        tmp_path / "run", "fsdp2", method="dancegrpo", model=str(tiny_wan), device="cuda", lora_r=2,
        train_dataset=str(prompts), eval_dataset=str(prompts), reward_funcs=["tests.grpo.toy.near"], height=16,
        width=16, num_frames=5, num_generations=2, per_device_train_batch_size=2, gradient_accumulation_steps=1,
        num_inference_steps=3, max_sequence_length=16, learning_rate=1e-2, max_steps=2, save_steps=1, eval_steps=1,
        sde_window_size=1, sde_window_per="rollout", beta=0.1, ema_decay=0.9, report_to="none", disable_tqdm=True,
        check_on_policy_ratio="raise", max_ratio_error=1e-4,
    )  # fmt: skip
    assert [row["step"] for row in lines_of(run)][-1] == 2
    DiffusionPipeline.from_pretrained(tiny_wan).load_lora_weights(run / "export")


@pytest.mark.parametrize("bf16", [False, True])
def test_grpo_ratio_is_one_on_a_gpu(tmp_path, bf16):
    """The ratio of the embedded model is 1 if rollout and training have equal batch sizes, so equal kernels."""
    run = launched(
        tmp_path / "run", "single", method="dancegrpo", train_dataset=str(ROOT / "recipes/prompts/two-bodies.jsonl"),
        reward_funcs=["world"], device="cuda", use_peft=False, num_generations=4, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, rollout_batch_size=4, num_inference_steps=8, max_steps=1, save_steps=0,
        logging_steps=1, bf16=bf16, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    assert lines_of(run)[0]["logp_diff/max"] <= 1e-5
