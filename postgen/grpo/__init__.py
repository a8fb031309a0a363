"""Reward-driven post-training (DanceGRPO, DiffusionNFT and relatives) of any diffusers pipeline that has a denoiser."""
