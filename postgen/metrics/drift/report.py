"""All drift measures of one clip in a report, and the comparison of two systems over many clips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.metrics.bootstrap import Interval, bootstrap, ratio_of_means
from postgen.metrics.colour import appearance

from .background import (
    BackgroundPSNR,
    ColourDrift,
    RevisitConsistency,
    background_psnr,
    colour_drift,
    revisit_consistency,
)
from .depth import DepthDrift, depth_drift, object_depth_error
from .motion import MotionRatio, motion_ratio, seam_ratio
from .permanence import Permanence, detect, object_permanence
from .start_end import SHARE, StartEnd, start_end, start_end_contrast

_DERIVED = ("change", "contrast", "least", "most")
"""Properties that the JSON form also contains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrueClip:
    """The true clip: tensors of one clip, from any world whose future is known.

    - `frames`: (F, 3, H, W) in [0, 1].
    - `ids`: int (F, H, W), 0 for static pixels, j + 1 for body j.
    - `palette`: (C, 3) or (C, S, 3) in [0, 1], colour of body j in row j, in S shades. Further rows are colours that
      no body has.
    - `others`: (N, 3), colours of pixels that show no body (`detect`).
    - `poses`: (F, ...) camera poses; bitwise equal values are the same pose.
    - `disparity`: (F, H, W), 1 / depth, 0 where there is no depth.
    - `texels`: (F, 2, H, W), position of each pixel on the ground, NaN where there is none.
    - `decoded`: (F, 3, H, W), the frames encoded and decoded by the autoencoder.
    """

    frames: Tensor
    ids: Tensor
    palette: Tensor
    others: Tensor | None = None
    poses: Tensor | None = None
    disparity: Tensor | None = None
    texels: Tensor | None = None
    decoded: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftReport:
    """Measures of one clip. None: an input of the measure is missing, or the clip has nothing to measure."""

    frames: int
    contrast: dict[str, StartEnd]
    """By measure: sharpness, colourfulness, saturation, luma_std, background_psnr, and depth_abs_rel with depth."""
    score: float
    """Start-end contrast in one number: mean over the first four measures of |excess| / mean of the true clip."""
    colour: ColourDrift
    permanence: Permanence
    background: BackgroundPSNR
    revisit: RevisitConsistency | None
    motion: MotionRatio
    seam: float | None
    depth: DepthDrift | None
    object_depth: StartEnd | None
    """Disagreement between depth and frames on bodies (`object_depth_error`)."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: numbers in nested dictionaries, no tensors; None for missing numbers."""
        found: dict[str, Any] = _plain(self)
        return found


def measure_drift(
    frames: Tensor,
    true: TrueClip,
    *,
    disparity: Tensor | None = None,
    borders: Sequence[int] = (),
    window: int = 0,
    gap: int = 8,
    revisit_gap: int = 16,
    farthest: float | None = None,
    threshold: float = 20.0,
    share: float = SHARE,
    parts: int = 7,
) -> DriftReport:
    """Measure how a long clip drifts away from the true clip.

    Args:
        frames: (F, 3, H, W) in [0, 1].
        true: the true clip. Measures whose input is missing are None, or NaN within `background`.
        disparity: (F, H, W), predicted by the model, in any scale; needs `true.disparity`.
        borders: numbers of the first frames of chunks, without frame 0, for the seam ratio; empty: no ratio.
        window: number of past frames that the model sees without its memory (`revisit_consistency`).
        gap: smallest number of frames of absence of a body before its return counts (`object_permanence`).
        revisit_gap: smallest number of frames between two visits of a pose (`revisit_consistency`).
        farthest: depth beyond which pixels do not count (`depth_drift`).
        threshold: colour distance (`detect`).
        share: share of the frames that count as start, and as end.
        parts: parts of the clip for the motion ratio.

    Raises:
        UserError: shapes that do not match, disparity without a true disparity, no background at the start or end,
            or values that a measure refuses (for instance, more `parts` than pairs of frames).
    """
    if frames.shape != true.frames.shape:
        raise UserError(
            f"frames have shape {tuple(frames.shape)}, the true clip has {tuple(true.frames.shape)}: give equal shapes"
        )
    if disparity is not None and true.disparity is None:
        raise UserError("disparity needs a true disparity: give TrueClip(disparity=...)")
    still = true.ids == 0
    colour = colour_drift(frames, true.frames, still, share)
    background = background_psnr(frames, true.frames, still, texels=true.texels, ceiling=true.decoded, share=share)
    kinds = detect(frames, true.palette, threshold, others=true.others)
    depth, agreement = None, None
    looks, true_looks = appearance(frames), appearance(true.frames)
    contrast = start_end_contrast(looks, true_looks, share)
    score = sum(abs(contrast[name].excess) / max(float(true_looks[name].mean()), 1e-12) for name in looks)
    contrast["background_psnr"] = background.psnr
    if disparity is not None and true.disparity is not None:
        depth = depth_drift(disparity, true.disparity, farthest=farthest, share=share)
        agreement = start_end(object_depth_error(depth.depth_FHW, true.disparity, kinds, true.ids), share=share)
        contrast["depth_abs_rel"] = depth.abs_rel
    revisit = None
    if true.poses is not None:
        revisit = revisit_consistency(frames, true.frames, still, true.poses, gap=revisit_gap, window=window)
    return DriftReport(
        frames=len(frames),
        contrast=contrast,
        score=score / len(looks),
        colour=colour,
        permanence=object_permanence(kinds, true.ids, gap=gap, share=share),
        background=background,
        revisit=revisit,
        motion=motion_ratio(frames, true.frames, parts),
        seam=seam_ratio(frames, borders, true.frames) if borders else None,
        depth=depth,
        object_depth=agreement,
    )


@dataclass(frozen=True, slots=True)
class Compared:
    """One number of two systems on the same clips."""

    clips: int
    """Number of clips for which both systems have the number; other clips are ignored."""
    a: float
    b: float
    """Means of system a and system b."""
    difference: Interval
    """Mean of a - b, with its 95 % interval over clips."""
    ratio: Interval | None
    """Mean of a divided by mean of b, with its 95 % interval; None if b has values that are not above 0."""


def compare_drift(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> dict[str, Compared]:
    """Compare two systems on the same clips, number by number.

    Args:
        a, b: `DriftReport.to_dict` of each clip, in the same order.
        seed: seed of the bootstrap.

    Returns:
        Every number that both systems have on at least two clips, by its dotted path ("permanence.after_absence",
        "contrast.sharpness.excess_size"). For each "excess" and "excess_slope" there is also the absolute value
        ("excess_size"), because opposite signs of single clips cancel in a mean although both clips drift.

    Raises:
        UserError: different numbers of clips, or fewer than 2.
    """
    if len(a) != len(b) or len(a) < 2:
        raise UserError(f"got {len(a)} and {len(b)} clips: give the same 2 or more clips for both systems")
    left, right = ([_numbers(row) for row in rows] for rows in (a, b))
    found = {}
    for name in dict.fromkeys(name for row in left for name in row):
        pairs = [(x[name], y[name]) for x, y in zip(left, right, strict=True) if name in x and name in y]
        if len(pairs) >= 2:
            found[name] = _compared(torch.tensor(pairs, dtype=torch.float64), seed)
    return found


def _compared(pairs: Tensor, seed: int) -> Compared:
    first, second = pairs.mean(0).tolist()
    difference = bootstrap(pairs[:, 0] - pairs[:, 1], seed=seed)
    ratio = bootstrap(pairs, ratio_of_means, seed=seed) if (pairs[:, 1] > 0).all() else None
    return Compared(len(pairs), first, second, difference, ratio)


def _numbers(row: Mapping[str, Any], path: str = "") -> dict[str, float]:
    """Return the numbers of nested dictionaries by dotted path."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{path}{key}.")
        elif isinstance(value, int | float) and math.isfinite(value):
            found[f"{path}{key}"] = float(value)
            if key in ("excess", "excess_slope"):
                found[f"{path}{key}_size"] = abs(float(value))
    return found


def _plain(value: Any) -> Any:
    """Return a value in its JSON form.

    Dataclasses become dictionaries with their `_DERIVED` properties, tuples become lists, and numbers that are not
    finite become None. Fields and entries that are tensors are left out.
    """
    if is_dataclass(value):
        names = [field.name for field in fields(value)] + [name for name in _DERIVED if hasattr(value, name)]
        value = {name: getattr(value, name) for name in names}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if not isinstance(item, Tensor)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
