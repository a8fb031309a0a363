"""Noise levels of a training batch: one per clip, a clean first latent frame, or one per latent frame.

A first latent frame without noise is image-to-video as in Wan 2.2 5B (`expand_timesteps`). A separate noise level for
each latent frame is diffusion forcing (arXiv:2407.01392).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

KINDS = ("one", "clean_first", "per_frame")
"""One level per clip; a clean first latent frame and one level for the others; one level per latent frame."""


def draw_kind(shares: Sequence[float], chance: random.Random) -> str:
    """Draw one of `KINDS` with these probabilities."""
    return chance.choices(KINDS, shares)[0]


def draw_sigma(
    kind: str, batch: int, frames: int, shift: float, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Draw shifted logit-normal noise levels (arXiv:2403.03206, eq. 19 and section 5.3.2).

    Args:
        kind: one of `KINDS`.
        batch, frames: number of clips, and of latent frames per clip.
        shift: at least 1; larger values move levels towards noise.
        generator, device: random generator and its device.

    Returns:
        (batch,) for "one", else (batch, frames), in [0, 1]; exactly 0 marks a given latent frame.
    """
    shape = (batch, frames) if kind == "per_frame" else (batch,)
    u = torch.randn(shape, generator=generator, device=device).sigmoid()
    sigma = shift * u / (1 + (shift - 1) * u)
    if kind != "clean_first":
        return sigma
    sigma = sigma[:, None].repeat(1, frames)
    sigma[:, 0] = 0
    return sigma


def noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return (1 - sigma) x0 + sigma noise of latents (B,C,T,h,w); sigma (B,) or (B,T)."""
    s = sigma.view(len(x0), 1, -1, 1, 1)
    return (1 - s) * x0 + s * noise


def flow_error(prediction: Tensor, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the mean squared error (B,) of the velocity noise - x0, over the latent frames that are not given.

    Args:
        prediction, x0, noise: (B,C,T,h,w).
        sigma: (B,) or (B,T); latent frames of level 0 are excluded.
    """
    error_BT = (prediction.float() - (noise - x0)).square().mean(dim=(1, 3, 4))
    counted = (sigma.view(len(x0), -1) > 0).to(error_BT.dtype).expand_as(error_BT)
    return (error_BT * counted).sum(1) / counted.sum(1)


def error_by_level(error_B: Tensor, sigma_B: Tensor) -> dict[str, float | Tensor]:
    """Return the mean error of the clips above and below noise level 0.75, as metrics."""
    error, late = error_B.detach(), (sigma_B > 0.75).float()
    return {
        "loss_noisy": (error * late).sum() / late.sum().clamp_min(1),
        "loss_clean": (error * (1 - late)).sum() / (1 - late).sum().clamp_min(1),
    }
