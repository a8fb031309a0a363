"""Errors of estimated disparity against the truth, after one scale and one shift are fitted to the whole clip.

Estimates from single pictures are known up to this scale and shift only (MiDaS, arXiv:1907.01341). One fit for all
frames keeps flicker and drift visible. Disparity is 1/Z or anything proportional to 1/Z, of shape (F,H,W).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import UserError


@dataclass(frozen=True, slots=True)
class DisparityErrors:
    """Errors of a disparity estimate; Z is the true depth and Z' the estimated depth.

    `abs_rel`: mean of |Z' - Z| / Z. `within_125`: share of pixels with max(Z'/Z, Z/Z') < 1.25. `rank`: Spearman's rank
    correlation, in [-1,1]. `flicker`: mean absolute change of the error from one frame to the next, divided by the
    mean true disparity; NaN for a clip of one frame.
    """

    abs_rel: float
    within_125: float
    rank: float
    flicker: float


def aligned(estimate_FHW: Tensor, true_FHW: Tensor, valid_FHW: Tensor) -> Tensor:
    """Return scale * estimate + shift in float64, with the least squared error over the valid pixels.

    Raises:
        UserError: different shapes, or no valid pixel.
    """
    if not estimate_FHW.shape == true_FHW.shape == valid_FHW.shape:
        shapes = [tuple(part.shape) for part in (estimate_FHW, true_FHW, valid_FHW)]
        raise UserError(f"estimate, truth and mask have the shapes {shapes}: give three tensors of the same shape")
    if not valid_FHW.any():
        raise UserError("no pixel is valid: give a mask with at least one")
    x, y = estimate_FHW[valid_FHW].double(), true_FHW[valid_FHW].double()
    spread = (x - x.mean()).square().mean()
    # For a constant estimate only the mean can be fitted.
    scale = ((x - x.mean()) * (y - y.mean())).mean() / spread if spread > 1e-20 else torch.zeros_like(spread)
    return (estimate_FHW.double() - x.mean()) * scale + y.mean()


def disparity_errors(
    estimate_FHW: Tensor, true_FHW: Tensor, valid_FHW: Tensor, least: float | None = None
) -> DisparityErrors:
    """Compare an estimate with the truth at the valid pixels, after `aligned` has fitted scale and shift.

    Args:
        estimate_FHW, true_FHW: disparity (F,H,W); the true disparity must be positive where it is valid.
        valid_FHW: bool mask.
        least: lower bound of the fitted disparity, so that no depth is infinite or negative; default: half the
            smallest valid true disparity.

    Raises:
        UserError: as in `aligned`, or a valid true disparity that is not positive and finite.
    """
    found = aligned(estimate_FHW, true_FHW, valid_FHW)
    true = true_FHW.double()
    kept = true[valid_FHW]
    if not (kept.isfinite() & (kept > 0)).all():
        raise UserError("a valid true disparity is not positive and finite: leave such pixels out of the mask")
    lowest = float(kept.min()) / 2 if least is None else least
    ratio = kept / found[valid_FHW].clamp_min(lowest)
    both = valid_FHW[1:] & valid_FHW[:-1]
    change = (found - true).diff(dim=0)[both].abs()
    return DisparityErrors(
        abs_rel=float((ratio - 1).abs().mean()),
        within_125=float((torch.maximum(ratio, 1 / ratio) < 1.25).double().mean()),
        rank=_spearman(estimate_FHW[valid_FHW], kept),
        flicker=float(change.mean() / kept.mean()) if len(change) else float("nan"),
    )


def _spearman(x: Tensor, y: Tensor) -> float:
    ranks = torch.stack((_ranks(x), _ranks(y)))
    if (ranks.std(1) == 0).any():
        return 0.0
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each value; equal values get the mean of their ranks."""
    _, group, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    mean: Tensor = last - (count.double() - 1) / 2
    return mean[group]
