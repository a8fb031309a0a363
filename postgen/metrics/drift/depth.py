"""Measures on generated depth: whether it keeps its scale and shape over a long clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import UserError

from .start_end import SHARE, StartEnd, ends, start_end


@dataclass(frozen=True, slots=True)
class DepthDrift:
    """Depth error after one scale and one shift for the whole clip, which are fitted on its start only."""

    abs_rel: StartEnd
    """Mean |depth - true| / true per frame. Its slope is the growth of the error."""
    delta: StartEnd
    """Share of pixels whose depth is within a factor of 1.25 of the true depth, per frame."""
    scale: float
    shift: float
    """True disparity is approximately scale * disparity + shift."""
    depth_FHW: Tensor
    """Aligned depth."""
    abs_rel_F: Tensor
    """Error of every frame, NaN where no pixel counts."""


def depth_drift(
    disparity: Tensor, true_disparity: Tensor, *, farthest: float | None = None, share: float = SHARE
) -> DepthDrift:
    """Return the depth error per frame and its growth. A constant error of scale or shift does not count.

    A pixel counts where the true disparity is above 0. Aligned disparity is clamped to at least half the smallest true
    disparity that counts, so that no depth is infinite.

    Args:
        disparity: (F, H, W), predicted by the model, with any scale and shift.
        true_disparity: (F, H, W), 1 / depth, 0 where there is no depth.
        farthest: true depth beyond which pixels do not count; None: all count.
        share: share of the frames that count as start, and as end.

    Raises:
        UserError: shapes that do not match, values that are not finite, fewer than 2 frames, a share outside (0, 0.5],
            or no pixel that counts at the start.
    """
    if disparity.shape != true_disparity.shape or disparity.dim() != 3:
        raise UserError(
            f"disparity has shape {tuple(disparity.shape)} and the true one {tuple(true_disparity.shape)}: give"
            " (F, H, W) for both"
        )
    if not (disparity.isfinite().all() and true_disparity.isfinite().all()):
        raise UserError("disparity must be finite: give 0 where there is no depth")
    disparity, true = disparity.double(), true_disparity.double()
    valid = true > 0 if farthest is None else true >= 1 / farthest
    first, _ = ends(len(disparity), share)
    if not valid[first].any():
        raise UserError("no pixel at the start has a true depth that counts, so the scale cannot be fitted")
    x, y = disparity[first][valid[first]], true[first][valid[first]]
    spread = (x - x.mean()).square().sum()
    # Constant predicted depth is not correlated with the truth: its best scale is 0.
    scale = ((x - x.mean()) * (y - y.mean())).sum() / spread if spread > 1e-12 * len(x) else spread.new_tensor(0.0)
    shift = y.mean() - scale * x.mean()
    depth = 1 / (scale * disparity + shift).clamp_min(0.5 * true[valid].min())
    ratio = depth * true
    error = _mean((ratio - 1).abs(), valid)
    close = _mean((torch.maximum(ratio, 1 / ratio.clamp_min(1e-12)) < 1.25).double(), valid)
    summaries = (start_end(error, share=share), start_end(close, share=share))
    return DepthDrift(*summaries, float(scale), float(shift), depth, error)


def object_depth_error(depth: Tensor, true_disparity: Tensor, kinds: Tensor, ids: Tensor) -> Tensor:
    """Return whether depth and frames agree, (F,): the mean depth error over bodies that are found by colour.

    For each body, the median depth over the pixels with its colour is compared with the true depth of this body in
    that frame, |depth - true| / true. NaN where no body is found.

    Args:
        depth: (F, H, W), aligned (`DepthDrift.depth_FHW`).
        true_disparity: (F, H, W).
        kinds: int (F, H, W), body of each pixel by its colour, or -1 (`detect`).
        ids: int (F, H, W), true body of each pixel plus 1; 0 for none.
    """
    rows = []
    for frame in range(len(depth)):
        errors = []
        for body in ids[frame].unique().tolist():
            found, there = kinds[frame] == body - 1, (ids[frame] == body) & (true_disparity[frame] > 0)
            if body and found.any() and there.any():
                true = 1 / true_disparity[frame][there].double().median()
                errors.append(float((depth[frame][found].double().median() - true).abs() / true))
        rows.append(sum(errors) / len(errors) if errors else float("nan"))
    return torch.tensor(rows, dtype=torch.float64)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum((1, 2)) / mask.sum((1, 2))
