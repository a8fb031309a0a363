"""The loss of a learned variance, used in addition to the noise loss (arXiv:2102.09672, sections 3.1 and 3.2).

The log variance of the reverse step t -> t - 1 is f log beta_t + (1 - f) log beta~_t with f = (v + 1) / 2 (eq. 15).
The divergence from the true posterior trains v only: the noise prediction is detached.
"""

from __future__ import annotations

import torch
from torch import Tensor


def variance_bound(
    noise: Tensor, predicted: Tensor, v: Tensor, timestep_B: Tensor, alpha_bars_T: Tensor, latents: Tensor
) -> Tensor:
    """Return the terms of the variational bound in nats per latent value, (B,); timestep 0 gives 0.

    The term of timestep 0 is left out because no sampler here takes a random step to the clean picture.

    Args:
        noise: (B, C, H, W) noise that was added.
        predicted: noise that the network predicts.
        v: channels of the variance.
        timestep_B: timesteps of the noisy latents, integers from 0.
        alpha_bars_T: alpha bars of the schedule.
        latents: (B, C, H, W) noisy latents, used for their device.
    """
    bars = alpha_bars_T.to(latents.device, torch.float64)
    before = torch.cat([bars.new_ones(1), bars[:-1]])
    betas = 1 - bars / before
    posterior = betas * (1 - before) / (1 - bars)
    # The means differ by (x0 - x0') sqrt(abar_{t-1}) beta_t / (1 - abar_t); x0 - x0' is the scaled noise error.
    factor = before.sqrt() * betas / (1 - bars) * ((1 - bars) / bars).sqrt()
    low = posterior.clamp_min(posterior[1]).log()  # the posterior variance of timestep 0 is 0
    step = timestep_B.to(bars.device)

    def of(table_T: Tensor) -> Tensor:
        return table_T[step].float().view(-1, 1, 1, 1)

    share = (v.float() + 1) / 2
    own = share * of(betas.log()) + (1 - share) * of(low)
    gap = of(factor) * (noise.float() - predicted.detach().float())
    divergence = 0.5 * (own - of(low) - 1 + (of(low) - own).exp() + gap.square() * (-own).exp())
    return torch.where(step > 0, divergence.mean(dim=(1, 2, 3)), 0.0)
