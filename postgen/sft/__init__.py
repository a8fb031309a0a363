"""Supervised fine-tuning of video and image models on clips and pictures with captions (`method: sft`)."""
