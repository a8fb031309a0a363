"""Reward-driven post-training (DanceGRPO, DiffusionNFT) of any diffusers pipeline that has a denoiser."""
