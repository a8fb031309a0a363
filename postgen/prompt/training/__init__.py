"""Training of a prompt enhancer: data for supervised fine-tuning, and rewards for GRPO of TRL."""
