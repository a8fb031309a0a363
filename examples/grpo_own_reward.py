"""DanceGRPO with your own reward function.

    python examples/grpo_own_reward.py

Runs two optimizer steps with tiny sizes; a real training needs more steps and larger sizes. Writes
`out/grpo/metrics.jsonl` and `out/grpo/export/pytorch_lora_weights.safetensors`, a LoRA that plain diffusers can load.
"""

import json
from pathlib import Path
from typing import Any

from postgen import DanceGRPOConfig, DanceGRPOTrainer

STEPS = 2
PROMPTS = ["a red ball rolls left", "a blue cube falls"]


def redness(completions: list[Any], **columns: Any) -> list[float]:
    """Return red minus the mean of green and blue for each clip. A clip is float32 (F, 3, H, W) in [0, 1]."""
    means = [clip.mean(dim=(0, 2, 3)) for clip in completions]
    return [float(red - (green + blue) / 2) for red, green, blue in means]


def main() -> None:
    """Train a LoRA with `redness` as the reward; `world`, with weight 0, is logged but not trained on."""
    args = DanceGRPOConfig(
        output_dir="out/grpo",
        **{"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 4},
        reward_weights=[1.0, 0.0],
        num_generations=4,  # clips per prompt; the advantage compares a reward to those of the same prompt
        per_device_train_batch_size=4,
        sde_type="exact",
        sde_window_size=2,  # two of the four sampling steps are stochastic, and only these are trained
        use_peft=True,
        max_steps=STEPS,
        **{"eval_steps": 0, "report_to": [], "disable_tqdm": True},
    )
    DanceGRPOTrainer(
        model=None,  # None is the embedded model; a folder, a model id of the Hub or a pipeline is possible too
        reward_funcs=[redness, "world"],
        args=args,
        train_dataset=[{"prompt": prompt} for prompt in PROMPTS],
    ).train()
    for line in Path("out/grpo/metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        print({key: row[key] for key in ("step", "reward", "loss") if key in row})


if __name__ == "__main__":
    main()
