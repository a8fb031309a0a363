"""Merging of checkpoints and of LoRA files."""
