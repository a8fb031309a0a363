"""What a flow's velocity of depth and flow is before a network has learned anything: read off their own noisy latents.

A velocity is noise minus data, so whoever predicts it must hand on the noise of every latent. A trained network does
that for RGB with most of its width; to learn it for a second modality takes thousands of steps, in which depth comes
out as the right shapes under a layer of noise. So the network only says what to add to the best linear guess, which
hands the noise on by itself (the skip connection of Karras et al., arXiv:2206.00364, equation 7, for a flow).
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_skip(added: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
    """Return velocities of latents whose data have a variance of about 1, which `WorldWeaverModel.latent_scale` makes.

    With z = (1 - s) x + s e and v = e - x, the best linear guess of v is k z, k = (2 s - 1) / d, and what is left has
    variance c^2 = 1 / d, where d = (1 - s)^2 + s^2.

    Args:
        added: (B, C, T, h, w) the network's output, in units of c.
        z: (B, C, T, h, w) noisy latents.
        sigma: (B, T) noise levels s from 0 to 1.
    """
    s = sigma.to(z)[:, None, :, None, None]
    d = (1 - s).square() + s.square()
    return torch.addcmul(added * d.rsqrt(), z, (2 * s - 1) / d)
