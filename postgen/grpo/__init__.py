"""Reward-driven post-training (DanceGRPO, DiffusionNFT and others) of any diffusers pipeline that has a denoiser."""
