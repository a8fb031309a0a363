"""Whether depth that a model makes beside its frames keeps its scale and its shape over a long clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import UserError

from .start_end import SHARE, StartEnd, ends, start_end


@dataclass(frozen=True, slots=True)
class DepthDrift:
    """Error of depth after one scale and one shift for the whole clip, fitted on its start alone."""

    abs_rel: StartEnd
    """Mean |depth - true| / true, per frame. Its slope is how fast the error grows."""
    delta: StartEnd
    """Share of pixels whose depth is within a factor of 1.25 of the truth, per frame."""
    scale: float
    shift: float
    """True disparity is about scale * disparity + shift."""
    depth_FHW: Tensor
    """The aligned depth."""
    abs_rel_F: Tensor
    """The error of every frame, NaN where nothing counts."""


def depth_drift(
    disparity: Tensor, true_disparity: Tensor, *, farthest: float | None = None, share: float = SHARE
) -> DepthDrift:
    """Return how the error of depth grows. A scale that is wrong but stays is fitted away, one that drifts is not.

    A pixel counts where the true disparity is above 0. Aligned disparity is kept above half the least true one that
    counts, so that no depth is infinite.

    Args:
        disparity: (F, H, W), that of the model, in any scale and with any shift.
        true_disparity: (F, H, W), 1 / depth, 0 where there is no depth.
        farthest: true depth beyond which pixels do not count; None: all count.
        share: of the frames that start and end are.

    Raises:
        UserError: forms that do not belong together, numbers that are not finite, or no pixel in the start.
    """
    if disparity.shape != true_disparity.shape or disparity.dim() != 3:
        raise UserError(
            f"disparity {tuple(disparity.shape)} and the true one {tuple(true_disparity.shape)} must both be (F, H, W)"
        )
    if not (disparity.isfinite().all() and true_disparity.isfinite().all()):
        raise UserError("disparity must be finite: give 0 where there is no depth")
    disparity, true = disparity.double(), true_disparity.double()
    valid = true > 0 if farthest is None else true >= 1 / farthest
    first, _ = ends(len(disparity), share)
    if not valid[first].any():
        raise UserError("no pixel of the start has a true depth that counts: its scale cannot be fitted")
    x, y = disparity[first][valid[first]], true[first][valid[first]]
    spread = (x - x.mean()).square().sum()
    # A depth without any shape explains nothing: its best scale is 0.
    scale = ((x - x.mean()) * (y - y.mean())).sum() / spread if spread > 1e-12 * len(x) else spread.new_tensor(0.0)
    shift = y.mean() - scale * x.mean()
    depth = 1 / (scale * disparity + shift).clamp_min(0.5 * true[valid].min())
    ratio = depth * true
    error = _mean((ratio - 1).abs(), valid)
    close = _mean((torch.maximum(ratio, 1 / ratio.clamp_min(1e-12)) < 1.25).double(), valid)
    summaries = (start_end(error, share=share), start_end(close, share=share))
    return DepthDrift(*summaries, float(scale), float(shift), depth, error)


def object_depth_error(depth: Tensor, true_disparity: Tensor, kinds: Tensor, ids: Tensor) -> Tensor:
    """Return whether the depth agrees with what the frames show, (F,): the mean over bodies found by colour.

    Of each body, the median depth over the pixels that have its colour is compared with the true depth that this body
    has at that time, |depth - true| / true. NaN where no body is found.

    Args:
        depth: (F, H, W), aligned (`DepthDrift.depth_FHW`).
        true_disparity: (F, H, W).
        kinds: int (F, H, W), body of each pixel by its colour or -1 (`detect`).
        ids: int (F, H, W), true body of each pixel plus 1, 0 for none.
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
