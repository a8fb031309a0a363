"""Motion of the clips of a rollout: its correlation with advantages, and advantages without the part it explains.

To first order an update changes the mean log motion of clips by the learning rate times the covariance of advantage
and log motion within groups. If the rewards favour clips that move more, motion therefore grows with every update,
although no reward asks for motion.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from postgen.metrics.video_measures import LEAST_CHANGE, frame_change

LEAST_SPREAD = 0.02
"""Std of log motion within a group below which motion explains less and less: smaller differences are noise."""


def motions(clips: Sequence[Tensor]) -> Tensor:
    """Return the (n,) motion of clips (F, 3, H, W), as evaluations measure it; 0 for pictures."""
    return torch.tensor([frame_change(clip) for clip in clips], dtype=torch.float64)


def log_motions(motion: Tensor) -> Tensor:
    """Return the logarithm of motion, at least that of `LEAST_CHANGE`; NaN stays NaN."""
    return motion.clamp_min(LEAST_CHANGE).log()


def residual(advantages: Tensor, log_motion: Tensor, group: int, kappa: float) -> Tensor:
    """Remove the part of the advantages that motion explains: A - kappa <A, m> / <m, m> m within each group.

    m is the log motion minus its mean over the group's samples with an advantage. With `kappa` 1 the result does not
    correlate with motion. In a group whose samples move almost equally, <m, m> is replaced by that of a std of
    `LEAST_SPREAD`, so advantages change little there; with equal motion they do not change.

    Args:
        advantages: (N, C), with mean 0 in each group, NaN where an advantage is missing.
        log_motion: (N,).
        group: number of rows of one prompt.
        kappa: share of the explained part that is removed.

    Returns:
        (N, C) advantages, with mean 0 in each group; NaN stays NaN.
    """
    groups = advantages.view(-1, group, advantages.shape[1])
    known = ~groups.isnan()
    m = torch.where(known, log_motion.to(advantages).view(-1, group, 1), torch.nan)
    m = (m - m.nanmean(1, keepdim=True)).nan_to_num(0.0)
    floor = known.sum(1, keepdim=True).clamp_min(1) * LEAST_SPREAD**2
    explained = (groups.nan_to_num(0.0) * m).sum(1, keepdim=True) / m.square().sum(1, keepdim=True).maximum(floor)
    return (groups - kappa * explained * m).reshape(advantages.shape)


def correlation(advantages: Tensor, log_motion: Tensor, group: int) -> float | None:
    """Return the correlation of advantage and log motion within groups, averaged over the groups.

    Args:
        advantages: (N,).
        log_motion: (N,).
        group: number of rows of one prompt.

    Returns:
        The mean correlation, in [-1, 1]. Groups in which one of the two does not vary are left out; None if none is
        left.
    """
    a, m = (values.double().view(-1, group) for values in (advantages, log_motion))
    a, m = a - a.mean(1, keepdim=True), m - m.mean(1, keepdim=True)
    lengths = a.norm(dim=1) * m.norm(dim=1)
    varied = lengths > 1e-12 * group
    if not bool(varied.any()):
        return None
    return float(((a * m).sum(1)[varied] / lengths[varied]).mean())


def motion_metrics(motion: Tensor, plain: Tensor, used: Tensor, group: int) -> dict[str, float]:
    """Return the metrics of motion of a rollout for the log.

    Args:
        motion: (N,) motion of the clips of all processes.
        plain: (N,) advantages before motion is taken out, before clipping and shuffling.
        used: (N,) advantages that the loss uses.
        group: number of rows of one prompt.
    """
    logs = log_motions(motion)
    found = {
        "motion/mean": float(motion.nanmean()),
        "motion/log_group_std": float(logs.view(-1, group).std(1).nanmean()),
        "motion/advantage_corr": correlation(plain, logs, group),
        "motion/advantage_corr_used": correlation(used, logs, group),
    }
    return {name: value for name, value in found.items() if value is not None}
