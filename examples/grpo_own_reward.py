"""DanceGRPO with a reward function of one's own.

    python examples/grpo_own_reward.py

Two steps of a tiny run show the whole path; raise `STEPS` and the sizes to learn something. Writes
`out/grpo/metrics.jsonl` and `out/grpo/export/pytorch_lora_weights.safetensors`, a LoRA that plain diffusers loads.
"""

import json
from pathlib import Path
from typing import Any

from postgen import DanceGRPOConfig, DanceGRPOTrainer

STEPS = 2
PROMPTS = ["a red ball rolls left", "a blue cube falls"]


def redness(completions: list[Any], **columns: Any) -> list[float]:
    """Return one number a clip: red minus the mean of green and blue. A clip is float32 (F, 3, H, W) in [0, 1]."""
    means = [clip.mean(dim=(0, 2, 3)) for clip in completions]
    return [float(red - (green + blue) / 2) for red, green, blue in means]


def main() -> None:
    """Train a LoRA on `redness`; the exact judge of the world is measured beside it and not trained on."""
    args = DanceGRPOConfig(
        output_dir="out/grpo",
        **{"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 4},
        reward_weights=[1.0, 0.0],
        num_generations=4,  # clips of one prompt; a reward counts relative to those of its group
        per_device_train_batch_size=4,
        sde_type="exact",
        sde_window_size=2,  # only two of the four steps are random and trained
        use_peft=True,
        max_steps=STEPS,
        **{"eval_steps": 0, "report_to": [], "disable_tqdm": True},
    )
    DanceGRPOTrainer(
        model=None,  # the embedded model; or a folder, a hub id, a pipeline
        reward_funcs=[redness, "world"],
        args=args,
        train_dataset=[{"prompt": prompt} for prompt in PROMPTS],
    ).train()
    for line in Path("out/grpo/metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        print({key: row[key] for key in ("step", "reward", "loss") if key in row})


if __name__ == "__main__":
    main()
