"""Skip connection that adds a linear guess of the velocity of depth and flow to the network's output.

The velocity of a flow model is noise minus data, so the network must pass the noise of every latent to its output. A
pretrained network uses most of its width for this task for RGB. It needs thousands of steps to learn the task for a
second modality, and until then depth has correct shapes under a layer of noise. With the skip connection the network
predicts only a correction to the best linear guess, and the linear guess passes the noise on (the skip connection of
Karras et al., arXiv:2206.00364, equation 7, for a flow model).
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_skip(added: Tensor, z: Tensor, sigma: Tensor) -> Tensor:
    """Return velocities for latents whose clean data have a variance of about 1 (see `WorldWeaverModel.latent_scale`).

    With z = (1 - s) x + s e and v = e - x, the best linear guess of v is k z with k = (2 s - 1) / d, and its residual
    has variance c^2 = 1 / d, where d = (1 - s)^2 + s^2.

    Args:
        added: (B, C, T, h, w) output of the network, the correction in units of c.
        z: (B, C, T, h, w) noisy latents.
        sigma: (B, T) noise levels s from 0 to 1.
    """
    s = sigma.to(z)[:, None, :, None, None]
    d = (1 - s).square() + s.square()
    return torch.addcmul(added * d.rsqrt(), z, (2 * s - 1) / d)
