"""Policy losses of one step: the clipped probability ratio, its normalisation, and the divergence from a reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.sampling.transition import Reduction, Transition, reduced


@dataclass(slots=True)
class StepLoss:
    """Loss and statistics of one step, one entry a row; nothing is read from the device."""

    loss: Tensor
    """(B,) to be minimised."""
    ratio: Tensor
    """(B,) probability ratio as it was clipped."""
    low: Tensor
    """(B,) 1 where the ratio fell below its clip and the advantage is negative."""
    high: Tensor
    """(B,) 1 where it rose above and the advantage is positive."""
    approx_kl: Tensor
    """(B,) estimate of the KL from the policy that drew the samples: ratio - 1 - log ratio."""

    def metrics(self) -> dict[str, Tensor]:
        """Return means for the log, under TRL's names."""
        ratio = self.ratio.detach()
        return {
            "policy_loss": self.loss.detach().mean(),
            "clip_ratio/low_mean": self.low.mean(),
            "clip_ratio/high_mean": self.high.mean(),
            "clip_ratio/region_mean": torch.maximum(self.low, self.high).mean(),
            "ratio/mean": ratio.mean(),
            "ratio/std": ratio.std(correction=0),
            "ratio/max": ratio.max(),
            "ratio/min": ratio.min(),
            "approx_kl": self.approx_kl.detach().mean(),
        }


def log_ratio(
    step: Transition,
    log_prob: Tensor,
    old_log_prob: Tensor,
    *,
    old_mean: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return (B,) log-ratios of the new policy to the one that drew the samples.

    Args:
        step: the transition under the new policy.
        log_prob: of the sample under it.
        old_log_prob: of the sample under the policy that drew it.
        old_mean: mean of that policy's transition; normalises the ratio as GRPO-Guard does (arXiv:2510.22319, eq. 8).
            The log-ratio of a moved mean is negative on average, so that the upper clip would never act; this
            centres it and gives every step the same spread.
        reduction: that of the log-probabilities.
    """
    plain = log_prob - old_log_prob
    if old_mean is None:
        return plain
    std = step.std.to(plain.dtype)
    drift = reduced((step.mean - old_mean).square(), reduction) / (2 * std.square())
    return (plain + drift) * std


def clipped_loss(log_ratio_B: Tensor, advantage_B: Tensor, low: float, high: float) -> StepLoss:
    """Return PPO's clipped loss max(-A r, -A clip(r, 1 - low, 1 + high)) of each row (arXiv:1707.06347, eq. 7)."""
    ratio = log_ratio_B.exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(-advantage_B * ratio, -advantage_B * clipped)
    below = (ratio < 1 - low) & (advantage_B < 0)
    above = (ratio > 1 + high) & (advantage_B > 0)
    approx_kl = ratio - 1 - log_ratio_B
    return StepLoss(loss, ratio, below.float(), above.float(), approx_kl)


def gaussian_kl(step: Transition, reference: Transition) -> Tensor:
    """Return (B,) KL of two transitions of equal std, the mean over latent values.

    It is |mean - mean_ref|^2 / (2 std^2) = c_t^2 |v - v_ref|^2 / 2. Flow-GRPO's image recipes divide by 2 g^2, which
    is smaller by the length of the step: their beta times that length is ours.
    """
    difference = (step.mean - reference.mean).square().flatten(1).mean(1)
    return difference / (2 * step.std.to(difference.dtype).square())


def velocity_kl(prediction: Tensor, reference: Tensor) -> Tensor:
    """Return (B,) mean square of the difference of two predictions."""
    return (prediction - reference).square().flatten(1).mean(1)
