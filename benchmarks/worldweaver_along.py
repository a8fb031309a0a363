"""Measures of a long clip over time, and rounding of written numbers.

A line (time series) has one number per latent frame, averaged over its video frames: 1,000 frames become 250 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from postgen.metrics.colour import appearance
from postgen.metrics.drift import DriftReport, TrueClip
from postgen.metrics.likeness import psnr

LINES = ("psnr", "presence", "motion", "saturation", "depth")
"""Background PSNR in dB; share of bodies in their places; motion divided by true motion; saturation minus true
saturation; relative error of depth."""
DIGITS = 5
"""Significant digits of every written number."""


def along(frames: Tensor, true: TrueClip, report: DriftReport, ends: Sequence[int]) -> dict[str, list[float | None]]:
    """Return the lines of a clip by name; None where the frames of a latent frame have no value.

    Args:
        frames: (F, 3, H, W) in [0, 1].
        true: the true clip.
        report: the drift measures of the clip.
        ends: last video frame of each latent frame (`latent_ends`).
    """
    saturation = appearance(frames)["saturation"] - appearance(true.frames)["saturation"]
    bodies = report.permanence.present_FJ.double()
    lines = {
        "psnr": psnr(frames, true.frames, true.ids == 0),
        "presence": bodies.nanmean(1) if bodies.shape[1] else bodies.new_full((len(bodies),), math.nan),
        "saturation": saturation,
    }
    if report.depth is not None:
        lines["depth"] = report.depth.abs_rel_F
    found = {name: _binned(line.double().cpu(), ends) for name, line in lines.items()}
    own, other = (_binned(_changes(clip), ends) for clip in (frames, true.frames))
    found["motion"] = [a / b if a is not None and b else None for a, b in zip(own, other, strict=True)]
    return {name: rounded(found[name]) for name in LINES if name in found}


def _changes(frames: Tensor) -> Tensor:
    """Return the mean absolute difference of each frame from the frame before; NaN for the first frame."""
    rows = (frames[1:] - frames[:-1]).abs().mean((1, 2, 3)).double().cpu()
    return torch.cat([rows.new_full((1,), math.nan), rows])


def _binned(line: Tensor, ends: Sequence[int]) -> list[float | None]:
    starts = [0, *(end + 1 for end in ends[:-1])]
    means = [float(line[low : high + 1].nanmean()) for low, high in zip(starts, ends, strict=True)]
    return [mean if math.isfinite(mean) else None for mean in means]


def rounded(value: Any) -> Any:
    """Round the numbers in nested dictionaries and lists to `DIGITS` significant digits.

    >>> rounded({"a": [0.123456789, 12345678.9, None, True, 7]})
    {'a': [0.12346, 12346000.0, None, True, 7]}
    """
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
