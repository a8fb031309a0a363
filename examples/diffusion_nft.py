"""DiffusionNFT: reward training with a fast deterministic sampler, without log-probabilities of the sampling steps.

    python examples/diffusion_nft.py

Runs two optimizer steps with tiny sizes. docs/dancegrpo.md has settings for a real training. Writes
`out/nft/metrics.jsonl` and `out/nft/export/pytorch_lora_weights.safetensors`.
"""

from postgen import DiffusionNFTTrainer
from postgen.grpo.nft import DiffusionNFTConfig

STEPS = 2


def main() -> None:
    """Train a LoRA with the exact judge of the synthetic world as the reward."""
    args = DiffusionNFTConfig(
        output_dir="out/nft",
        **{"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 4},
        rollout_solver="dpm++",
        num_generations=4,
        per_device_train_batch_size=4,
        use_peft=True,
        max_steps=STEPS,
        **{"eval_steps": 0, "report_to": [], "disable_tqdm": True},
    )
    trainer = DiffusionNFTTrainer(
        model=None,
        reward_funcs=["world"],
        args=args,
        train_dataset=[{"prompt": "a red ball rolls left"}, {"prompt": "a blue cube falls"}],
    )
    result = trainer.train()
    print({key: round(value, 4) for key, value in result.metrics.items() if key in ("loss", "reward")})


if __name__ == "__main__":
    main()
