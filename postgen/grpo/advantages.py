"""Advantages: how much better the rewards of a sample are than those of the other samples of its prompt.

Rows are ordered prompt by prompt, with `group` rows for each prompt. Means and standard deviations leave out missing
rewards (NaN). A row without any reward gets advantage 0. Standard deviations are unbiased, as in torch and TRL.

    sum_of_advantages   sum_k w_k (r_k - mean_group r_k) / (std r_k + eps)          DanceGRPO, arXiv:2505.07818, Alg. 1
    sum_then_normalize  r = sum_k w_k r_k, then (r - mean_group r) / (std r + eps)                TRL's GRPOTrainer
    normalize_then_sum  z-score of each reward in its group, weighted sum, then a z-score over the batch      TRL, GDPO

DanceGRPO clips in two ways. Its code for FLUX has one reward and clips the advantage that the loss uses. Its code for
HunyuanVideo has two rewards, clips the advantage of each, and adds two clipped losses with the weights. The paper does
not mention a clip. The setting `advantage_clip_per` chooses between the weighted sum (a sum of one or several rewards)
and each reward; `loss_per` of DanceGRPO's trainer gives each reward its own loss.

A group whose rewards are all equal carries no signal. Division by its standard deviation would amplify rounding
errors, so the group gets exactly 0 and is counted in the metric `frac_reward_zero_std`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .motion import residual

Aggregation = Literal["sum_of_advantages", "sum_then_normalize", "normalize_then_sum"]
Scale = Literal["group", "batch", "max", "rank", "none"]
ClipPer = Literal["sum", "reward"]

_FLOOR = 1e-6
"""A group has no spread if its std is below this share of its largest absolute reward (a few float32 roundings)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advantages:
    """Advantages of N samples in N / group groups."""

    values: Tensor
    """(N,) float32, clipped. The loss uses these."""
    gains: Tensor
    """(N,) float32, the sum of the positive parts of `values`, one part for each reward. The negative parts sum to
    `values` - `gains`."""
    unclipped: Tensor
    """(N,) float32, before clipping. Best-of-N ranks samples by these."""
    plain: Tensor
    """(N,) float32, as `unclipped`, but with the part that motion explains."""
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

    def shuffled(self, seeds: list[int]) -> Advantages:
        """Return the advantages in another order within each group, for an experiment that must learn nothing.

        Args:
            seeds: seed of the order of each group. `rewards` and `plain` keep their order.
        """
        group = len(self.values) // len(seeds)
        orders = [torch.randperm(group, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        order = torch.cat([number * group + each for number, each in enumerate(orders)])
        moved = {name: getattr(self, name)[order] for name in ("values", "gains", "unclipped")}
        return replace(self, **moved)


def compute_advantages(
    rewards: Tensor,
    weights: Tensor,
    group: int,
    *,
    aggregation: Aggregation = "sum_of_advantages",
    scale: Scale = "group",
    clip: float = 5.0,
    clip_per: ClipPer = "sum",
    eps: float = 1e-4,
    dead_zone: float = 0.0,
    log_motion: Tensor | None = None,
    kappa: float = 0.0,
) -> Advantages:
    """Compute the advantages of N samples from their K rewards.

    Args:
        rewards: (N, K), NaN where a reward is missing.
        weights: (K,) weight of each reward.
        group: number of rows (samples) of one prompt, at least 2.
        aggregation: how the K rewards of a sample are combined; the module docstring has the formulas.
        scale: divisor of the difference from the group's mean: the std of the group, the std of the whole batch, the
            largest std of a group (GenRL's `max_group_std`), or none. "rank" first replaces a reward by its win rate
            in the group (Pref-GRPO, arXiv:2508.20751). It has no effect for `normalize_then_sum`, as in TRL.
        clip: advantages are clipped to [-clip, clip].
        clip_per: what is clipped: the weighted sum, or the advantage of each reward before its weight. The latter is
            for `sum_of_advantages` only.
        eps: added to the standard deviation.
        dead_zone: rewards that differ by at most this much are ties for "rank".
        log_motion: (N,) log motion of the clips; needed if `kappa` is not 0.
        kappa: share of the correlation with motion that is removed before clipping, see `motion.residual`.

    Raises:
        ValueError: N is not a multiple of `group`, or `group` is below 2.
    """
    if group < 2 or len(rewards) % group:
        raise ValueError(f"{len(rewards)} rows cannot be split into groups of {group}; a group has at least 2 rows")
    rewards, weights = rewards.double(), weights.double()
    unscored = rewards.isnan().all(1)
    total = _weighted_sum(rewards, weights)
    scored = total[:, None] if aggregation == "sum_then_normalize" else rewards
    if scale == "rank":
        scored = win_rates(scored, group, dead_zone)
    zero_std = ~_spread(_grouped(scored, group))[1].any(-1).reshape(-1)
    # (N, C) advantages, one column for each reward or one for all of them, and the weights of the columns.
    each = _standardized(scored, group, "group" if aggregation == "normalize_then_sum" else scale, eps)
    if aggregation == "normalize_then_sum":
        each = _standardized(_weighted_sum(each, weights)[:, None], len(each), "group", eps)
    if aggregation != "sum_of_advantages":
        weights = weights.new_ones(1)
    each = each.masked_fill((unscored | zero_std.repeat_interleave(group))[:, None], torch.nan)
    plain = (each.nan_to_num(0.0) * weights).sum(1).float()
    if kappa:
        assert log_motion is not None
        each = residual(each, log_motion, group, kappa)
    shares = each.nan_to_num(0.0) * weights
    unclipped = shares.sum(1).float()
    if clip_per == "reward":
        shares = each.nan_to_num(0.0).clamp(-clip, clip) * weights
    values = shares.sum(1).float() if clip_per == "reward" else unclipped.clamp(-clip, clip)
    return Advantages(
        values=values,
        gains=shares.clamp_min(0).sum(1).float() if clip_per == "reward" else values.clamp_min(0),
        unclipped=unclipped,
        plain=plain,
        rewards=total.float(),
        zero_std=zero_std,
    )


def win_rates(values: Tensor, group: int, dead_zone: float = 0.0) -> Tensor:
    """Replace each of (N, K) values by the share of the other samples of its group that it exceeds.

    Args:
        values: NaN where a value is missing; these stay NaN and are not counted.
        group: number of rows of one prompt.
        dead_zone: two values that differ by at most this much are a tie, which counts as 1/2. With 0 the result does
            not change when a rising function is applied to the values.

    Returns:
        (N, K) in [0, 1]; 1/2 for a value without another one in its group.
    """
    groups = _grouped(values, group)
    mine, others = groups[:, :, None], groups[:, None]  # (P, G, 1, K), (P, 1, G, K)
    ahead, behind = mine > others + dead_zone, others > mine + dead_zone
    pairs = ~(mine.isnan() | others.isnan())
    # A value is in a tie with itself. This pair is taken out of the sum and of the count.
    won = torch.where(pairs, 0.5 * (1 + ahead.double() - behind.double()), 0.0).sum(2) - 0.5
    count = pairs.sum(2) - 1
    rates = torch.where(count > 0, won / count.clamp_min(1), 0.5)
    return rates.masked_fill(groups.isnan(), torch.nan).reshape(values.shape)


def group_stds(values: Tensor, group: int) -> Tensor:
    """Return the (K,) unbiased std of (N, K) values within groups, averaged over the groups; NaN without a group.

    Groups with fewer than two known values are left out.
    """
    groups = _grouped(values.double(), group)
    std = _spread(groups)[0][:, 0]
    enough = (~groups.isnan()).sum(1) > 1
    return torch.where(enough, std, torch.nan).nanmean(0)


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
    elif scale == "max":
        std = std.amax(0, keepdim=True)
    scaled = centred if scale == "none" else centred / (std + eps)
    return scaled.reshape(values.shape)
