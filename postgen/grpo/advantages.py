"""Advantages: how much better the rewards of a sample are than those of the other samples of its prompt.

Rows are ordered prompt by prompt, with `group` rows for each prompt. Means and standard deviations leave out missing
rewards (NaN). A row without any reward gets advantage 0. Standard deviations are unbiased, as in torch and TRL.

    sum_of_advantages   sum_k w_k (r_k - mean_group r_k) / (std r_k + eps)          DanceGRPO, arXiv:2505.07818, Alg. 1
    sum_then_normalize  r = sum_k w_k r_k, then (r - mean_group r) / (std r + eps)                TRL's GRPOTrainer
    normalize_then_sum  z-score of each reward in its group, weighted sum, then a z-score over the batch      TRL, GDPO

A group whose rewards are all equal carries no signal. Division by its standard deviation would amplify rounding
errors, so the group gets exactly 0 and is counted in the metric `frac_reward_zero_std`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["sum_of_advantages", "sum_then_normalize", "normalize_then_sum"]
Scale = Literal["group", "batch", "none"]

_FLOOR = 1e-6
"""A group has no spread if its std is below this share of its largest absolute reward (a few float32 roundings)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advantages:
    """Advantages of N samples in N / group groups."""

    values: Tensor
    """(N,) float32, clipped. The loss uses these."""
    unclipped: Tensor
    """(N,) float32, before clipping. Best-of-N ranks samples by these."""
    rewards: Tensor
    """(N,) weighted sum of the rewards; NaN for a row without any reward."""
    zero_std: Tensor
    """(N / group,) bool, true where a group has no spread in any reward."""

    def metrics(self) -> dict[str, float]:
        """Return mean rewards and advantages for the log, under TRL's metric names."""
        known = self.rewards[~self.rewards.isnan()]
        return {
            "reward": known.mean().item() if len(known) else float("nan"),
            "reward_std": known.std().item() if len(known) > 1 else 0.0,
            "frac_reward_zero_std": self.zero_std.float().mean().item(),
            "advantage/abs_mean": self.values.abs().mean().item(),
            "advantage/clipped": (self.values != self.unclipped).float().mean().item(),
        }


def compute_advantages(
    rewards: Tensor,
    weights: Tensor,
    group: int,
    *,
    aggregation: Aggregation = "sum_of_advantages",
    scale: Scale = "group",
    clip: float = 5.0,
    eps: float = 1e-4,
) -> Advantages:
    """Compute the advantages of N samples from their K rewards.

    Args:
        rewards: (N, K), NaN where a reward is missing.
        weights: (K,) weight of each reward.
        group: number of rows (samples) of one prompt, at least 2.
        aggregation: how the K rewards of a sample are combined; the module docstring has the formulas.
        scale: divisor of the difference from the group's mean: the std of the group, the std of the whole batch, or
            none. It has no effect for `normalize_then_sum`, as in TRL.
        clip: advantages are clipped to [-clip, clip].
        eps: added to the standard deviation.

    Raises:
        ValueError: N is not a multiple of `group`, or `group` is below 2.
    """
    if group < 2 or len(rewards) % group:
        raise ValueError(f"{len(rewards)} rows cannot be split into groups of {group}; a group has at least 2 rows")
    rewards, weights = rewards.double(), weights.double()
    unscored = rewards.isnan().all(1)
    total = _weighted_sum(rewards, weights)
    if aggregation == "sum_then_normalize":
        raw = _standardized(total[:, None], group, scale, eps)[:, 0]
    else:
        per_reward = _standardized(rewards, group, scale if aggregation == "sum_of_advantages" else "group", eps)
        raw = _weighted_sum(per_reward, weights)
        if aggregation == "normalize_then_sum":
            raw = _standardized(raw[:, None], len(raw), "group", eps)[:, 0]
    by_reward = rewards if aggregation != "sum_then_normalize" else total[:, None]
    zero_std = ~_spread(_grouped(by_reward, group))[1].any(-1).reshape(-1)
    raw = raw.nan_to_num(0.0).masked_fill(unscored | zero_std.repeat_interleave(group), 0.0).float()
    return Advantages(values=raw.clamp(-clip, clip), unclipped=raw, rewards=total.float(), zero_std=zero_std)


def best_and_worst(scores: Tensor, group: int, keep: int) -> Tensor:
    """Select the rows to train on: in each group the ceil(keep / 2) highest and the floor(keep / 2) lowest scores.

    Args:
        scores: (N,) unclipped advantages, prompt by prompt.
        group: number of rows of one prompt.
        keep: number of rows to keep in each group; all rows are kept if it is at least `group`.

    Returns:
        (N / group * keep,) row numbers into `scores`, rising within each group.
    """
    rows = torch.arange(len(scores), device=scores.device).view(-1, group)
    if keep >= group:
        return rows.flatten()
    order = scores.view(-1, group).argsort(dim=1, descending=True, stable=True)
    high, low = keep - keep // 2, keep // 2
    chosen = torch.cat([order[:, :high], order[:, group - low :]], dim=1)
    return rows.gather(1, chosen.sort(dim=1).values).flatten()


def _weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Return the (N,) weighted sums of (N, K) values. NaN counts as 0; a row of NaN only gives NaN."""
    total = (values.nan_to_num(0.0) * weights).sum(1)
    return total.masked_fill(values.isnan().all(1), float("nan"))


def _grouped(values: Tensor, group: int) -> Tensor:
    """Reshape (N, K) to (N / group, group, K)."""
    return values.view(-1, group, values.shape[1])


def _spread(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unbiased std of each group, (P, 1, K), and whether it exceeds rounding errors; NaN is left out."""
    known = ~groups.isnan()
    count = known.sum(1, keepdim=True)
    centred = (groups - groups.nanmean(1, keepdim=True)).nan_to_num(0.0)
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    largest = groups.nan_to_num(0.0).abs().amax(1, keepdim=True)
    return std, std > _FLOOR * largest


def _standardized(values: Tensor, group: int, scale: Scale, eps: float) -> Tensor:
    """Subtract the group's mean from (N, K) values and divide by the chosen std; 0 in a group without spread."""
    groups = _grouped(values, group)
    std, spread = _spread(groups)
    centred = (groups - groups.nanmean(1, keepdim=True)) * spread
    if scale == "batch":
        std = _spread(values[None])[0]
    scaled = centred if scale == "none" else centred / (std + eps)
    return scaled.reshape(values.shape)
