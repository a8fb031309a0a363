"""GRPO recipes are valid configurations, and presets have the costs that they name."""

from pathlib import Path

import pytest

from postgen.grpo.nft import DiffusionNFTTrainer
from postgen.grpo.trainer import DanceGRPOTrainer
from postgen.training import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {
    "dancegrpo": DanceGRPOTrainer,
    "dancegrpo-tiny": DanceGRPOTrainer,
    "fast-image": DanceGRPOTrainer,
    "fast-video": DanceGRPOTrainer,
    "fast-tiny": DanceGRPOTrainer,
    "nft-tiny": DiffusionNFTTrainer,
    "nft-video": DiffusionNFTTrainer,
}


@pytest.mark.parametrize("name", RECIPES)
def test_grpo_recipe_is_complete(name):
    from postgen.grpo.batches import Batches
    from postgen.rewards import RewardRunner

    trainer, config = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert trainer is RECIPES[name]
    batches = Batches.of(config, 1, 0)
    assert batches.prompts >= 4
    # The names of the rewards must exist; no model is loaded.
    RewardRunner(config.reward_funcs, config.reward_weights or None)
    RewardRunner(config.eval_reward_funcs or ["world"])


def test_grpo_prompts_of_the_world_are_apart():
    import json

    files = [ROOT / "recipes" / "prompts" / f"two-bodies{part}.jsonl" for part in ("", "-held-out")]
    train, held_out = ([json.loads(line)["prompt"] for line in path.read_text().splitlines()] for path in files)
    assert (len(set(train)), len(held_out)) == (2048, 256)
    assert not set(train) & set(held_out)
    from postgen.world import parse

    assert all(len(parse(prompt).bodies) == 2 for prompt in [*train[::16], *held_out])


def test_grpo_recipe_of_the_embedded_model_runs(tmp_path):
    words = {
        "output_dir": str(tmp_path), "device": "cpu", "max_steps": "1", "num_generations": "2", "lora_r": "2",
        "per_device_train_batch_size": "2", "gradient_accumulation_steps": "1", "num_inference_steps": "3",
        "use_peft": "true", "guidance_scale": "1", "num_frames": "5", "eval_steps": "0", "eval_on_start": "false",
        "report_to": "none", "disable_tqdm": "true", "check_on_policy_ratio": "raise",
        "bf16": "false",
    }  # fmt: skip
    overrides = [word for key, value in words.items() for word in (f"--{key}", value)]
    trainer, config = load_recipe(ROOT / "recipes" / "dancegrpo-tiny.yaml", overrides)
    result = trainer.from_config(config).train()
    assert 0 <= result.metrics["rewards/world/mean"] <= 1
    assert (tmp_path / "export" / "pytorch_lora_weights.safetensors").is_file()
