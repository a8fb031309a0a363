"""Policy losses of one sampling step: clipped or masked ratio, its normalisation, divergence from a reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from postgen.sampling.transition import Reduction, Transition, reduced


@dataclass(slots=True)
class StepLoss:
    """Loss and statistics of one sampling step, one entry per row. All values stay on the device."""

    loss: Tensor
    """(B,) loss to minimise."""
    ratio: Tensor
    """(B,) probability ratio before clipping, normalised if `log_ratio` normalises it."""
    low: Tensor
    """(B,) 1 where the advantage is negative and the row is clipped or masked, else 0."""
    high: Tensor
    """(B,) 1 where the advantage is positive and the row is clipped or masked, else 0."""
    approx_kl: Tensor
    """(B,) estimate of the KL divergence from the policy that drew the samples: ratio - 1 - log ratio."""

    def metrics(self) -> dict[str, Tensor]:
        """Return mean values for the log, under TRL's metric names."""
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
    """Return the (B,) log-ratios of the new policy to the policy that drew the samples.

    Args:
        step: transition under the new policy.
        log_prob: (B,) log-probability of the drawn next latents under the new policy.
        old_log_prob: (B,) log-probability of the same latents under the policy that drew them.
        old_mean: (B, ...) mean of the transition under the policy that drew the samples. If given, the ratio is
            normalised as in GRPO-Guard (arXiv:2510.22319, eq. 8). Without normalisation the log-ratio is negative on
            average once the mean moves, so the upper clip would never act. The normalisation centres the log-ratio and
            gives every step the same spread.
        reduction: reduction that both log-probabilities were computed with.
    """
    plain = log_prob - old_log_prob
    if old_mean is None:
        return plain
    return (plain + drift(step, old_mean, reduction)) * step.std.to(plain.dtype)


def drift(step: Transition, old_mean: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Return by how much (B,) the move of the mean lowers the log-ratio of samples of the old policy, on average.

    With the variance in the log-probability and the reduction "mean", this is the KL divergence per latent value.
    """
    square = reduced((step.mean - old_mean).square(), reduction)
    return square / (2 * step.std.to(square.dtype).square()) if step.has_scale else square


def clipped_loss(log_ratio_B: Tensor, advantage_B: Tensor, low: float, high: float) -> StepLoss:
    """Compute PPO's clipped loss max(-A r, -A clip(r, 1 - low, 1 + high)) for each row (arXiv:1707.06347, eq. 7)."""
    ratio = log_ratio_B.exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(-advantage_B * ratio, -advantage_B * clipped)
    below = (ratio < 1 - low) & (advantage_B < 0)
    above = (ratio > 1 + high) & (advantage_B > 0)
    approx_kl = ratio - 1 - log_ratio_B
    return StepLoss(loss, ratio, below.float(), above.float(), approx_kl)


def clipped_losses(
    log_ratio_B: Tensor, advantage_B: Tensor, gain_B: Tensor | None, low: float, high: float
) -> StepLoss:
    """Compute the sum of the clipped losses of several rewards for each row.

    A clipped loss is linear in advantages of one sign, so the losses of all positive advantages are one loss, and so
    are those of all negative ones.

    Args:
        log_ratio_B: (B,) log-ratios.
        advantage_B: (B,) sum of the advantages of all rewards, times their weights.
        gain_B: (B,) sum of the positive ones; None computes one loss of the sum.
        low: lower clip of the ratio, at 1 - low.
        high: upper clip of the ratio, at 1 + high.
    """
    if gain_B is None:
        return clipped_loss(log_ratio_B, advantage_B, low, high)
    for_it = clipped_loss(log_ratio_B, gain_B, low, high)
    against_it = clipped_loss(log_ratio_B, advantage_B - gain_B, low, high)
    return replace(for_it, loss=for_it.loss + against_it.loss, low=against_it.low)


def masked_loss(log_ratio_B: Tensor, advantage_B: Tensor, kl_B: Tensor, centred_B: Tensor, delta: float) -> StepLoss:
    """Compute Flow-DPPO's loss for each row (arXiv:2606.11025): -A r, and 0 where the policy has moved far enough.

    A row is masked if its step has left the trust region, KL >= delta, and its gradient would lead further away: the
    probability of the sample has risen and A is positive, or it has fallen and A is negative. The published mask reads
    the direction from the sign of log r. In large latents that sign is almost always negative, whatever the policy
    did, because the mean of log r is -KL. Here the sign of log r + KL decides.

    Args:
        log_ratio_B: log-ratios r of the loss.
        advantage_B: advantages A.
        kl_B: KL divergences of the step from the policy that drew the samples, per latent value.
        centred_B: log-ratios plus their `drift`.
        delta: size of the trust region, at least 0; infinity masks nothing.
    """
    ratio = log_ratio_B.exp()
    outside = kl_B.detach() >= delta
    down = outside & (centred_B < 0) & (advantage_B < 0)
    up = outside & (centred_B > 0) & (advantage_B > 0)
    loss = torch.where(down | up, 0, -advantage_B * ratio)
    return StepLoss(loss, ratio, down.float(), up.float(), ratio - 1 - log_ratio_B)


def gaussian_kl(step: Transition, reference: Transition) -> Tensor:
    """Return the (B,) KL divergences of two transitions of equal std, averaged over latent values.

    The KL is |mean - mean_ref|^2 / (2 std^2) = c_t^2 |v - v_ref|^2 / 2. Flow-GRPO's code for Wan divides like this,
    so its beta of 0.004 has the same meaning here. Its image recipes divide by 2 g^2 instead, and std^2 = g^2 D for a
    step of length D. The same loss therefore needs beta = (their beta) * D here.
    """
    return moved_kl(step, reference.mean)


def moved_kl(step: Transition, mean: Tensor) -> Tensor:
    """Return the `gaussian_kl` (B,) of a transition and one of equal std with another mean (B, ...)."""
    difference = (step.mean - mean).square().flatten(1).mean(1)
    return difference / (2 * step.std.to(difference.dtype).square())


def velocity_kl(prediction: Tensor, reference: Tensor) -> Tensor:
    """Return the (B,) mean square differences of two predictions (B, ...)."""
    return (prediction - reference).square().flatten(1).mean(1)
