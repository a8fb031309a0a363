"""All measures of drift of one clip together, and two systems compared over many clips."""

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
"""Properties that the JSON form holds too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrueClip:
    """What a clip should be: tensors of one clip, from any world whose future is known.

    `frames` (F, 3, H, W) in [0, 1]. `ids` int (F, H, W): 0 for what stands still, j + 1 for body j. `palette` (C, 3)
    or (C, S, 3) in [0, 1]: colour of body j in row j, in S shades; rows beyond the bodies are colours that none has.
    `others` (N, 3): colours of what is no body (`detect`).
    `poses` (F, ...), of the camera: equal bits are the same pose. `disparity` (F, H, W), 1 / depth, 0 where there is
    none. `texels` (F, 2, H, W), place of each pixel on the ground, NaN where there is none. `decoded` (F, 3, H, W):
    the frames after the autoencoder's round trip.
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
    """Measures of one clip. None: what they need was not given, or the clip has none of it."""

    frames: int
    contrast: dict[str, StartEnd]
    """By measure: sharpness, colourfulness, saturation, luma_std, background_psnr, and depth_abs_rel with depth."""
    score: float
    """Mean over the first four measures of |excess| over the true clip's mean: start-end contrast in one number."""
    colour: ColourDrift
    permanence: Permanence
    background: BackgroundPSNR
    revisit: RevisitConsistency | None
    motion: MotionRatio
    seam: float | None
    depth: DepthDrift | None
    object_depth: StartEnd | None
    """Disagreement of depth and frames about bodies (`object_depth_error`)."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form: numbers in nested dicts, no tensors; None for what is not known."""
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
    """Measure how a long clip drifts away from what it should be.

    Args:
        frames: (F, 3, H, W) in [0, 1].
        true: what they should be; what it lacks is not measured.
        disparity: (F, H, W), depth that the model made, in any scale; needs `true.disparity`.
        borders: numbers of the first frames of chunks, for the seam ratio.
        window: frames back that the model sees besides its memory (`revisit_consistency`).
        gap: frames that a body is gone before its return counts (`object_permanence`).
        revisit_gap: frames between two visits of a pose (`revisit_consistency`).
        farthest: depth from which on pixels do not count (`depth_drift`).
        threshold: of colours (`detect`).
        share: of the frames that start and end are.
        parts: of the clip, for the motion ratio.

    Raises:
        UserError: forms that do not belong together, depth without a true one, or no background in start or end.
    """
    if frames.shape != true.frames.shape:
        raise UserError(f"frames {tuple(frames.shape)}, but the true clip is {tuple(true.frames.shape)}")
    if disparity is not None and true.disparity is None:
        raise UserError("disparity without a true one: give TrueClip(disparity=...) too")
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
    """One number of two systems over the same clips."""

    clips: int
    """Clips of which both have the number; the others are left out."""
    a: float
    b: float
    """Means."""
    difference: Interval
    """Mean of a - b, with its 95 % interval over clips."""
    ratio: Interval | None
    """Mean of a over mean of b, likewise; None where b has values that are not above 0."""


def compare_drift(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], *, seed: int = 0
) -> dict[str, Compared]:
    """Compare two systems on the same clips, number by number.

    Args:
        a, b: `DriftReport.to_dict` of each clip, in the same order.
        seed: of the bootstrap.

    Returns:
        By path with dots ("permanence.after_absence", "contrast.sharpness.excess_size"), every number that both have
        on at least two clips. Beside each "excess" and "excess_slope" stands its size ("excess_size"): signs of single
        clips cancel in means, drifts do not.

    Raises:
        UserError: different numbers of clips, or fewer than 2.
    """
    if len(a) != len(b) or len(a) < 2:
        raise UserError(f"two systems are compared on the same clips, 2 or more: got {len(a)} and {len(b)}")
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
    """Numbers of nested dicts by path."""
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
    """Without tensors, and None instead of numbers that are not finite."""
    if is_dataclass(value):
        names = [field.name for field in fields(value)] + [name for name in _DERIVED if hasattr(value, name)]
        value = {name: getattr(value, name) for name in names}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if not isinstance(item, Tensor)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
