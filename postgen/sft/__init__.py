"""Supervised fine-tuning on images and videos with captions."""
