"""Measures of drift: how a long clip departs from the true clip. They are exact where the true clip is known.

The measures use tensors only, no model and no world. docs/drift.md explains each number, and lists which numbers a
frozen video would win.
"""

from .background import (
    BackgroundPSNR,
    ColourDrift,
    RevisitConsistency,
    Revisits,
    background_psnr,
    colour_drift,
    revisit_consistency,
)
from .cost import Flatness, flat_cost
from .depth import DepthDrift, depth_drift, object_depth_error
from .motion import MotionRatio, motion_ratio, seam_ratio
from .permanence import Permanence, detect, object_permanence
from .report import Compared, DriftReport, TrueClip, compare_drift, measure_drift
from .start_end import SHARE, StartEnd, ends, slope, start_end, start_end_contrast

__all__ = [
    "SHARE",
    "BackgroundPSNR",
    "ColourDrift",
    "Compared",
    "DepthDrift",
    "DriftReport",
    "Flatness",
    "MotionRatio",
    "Permanence",
    "RevisitConsistency",
    "Revisits",
    "StartEnd",
    "TrueClip",
    "background_psnr",
    "colour_drift",
    "compare_drift",
    "depth_drift",
    "detect",
    "ends",
    "flat_cost",
    "measure_drift",
    "motion_ratio",
    "object_depth_error",
    "object_permanence",
    "revisit_consistency",
    "seam_ratio",
    "slope",
    "start_end",
    "start_end_contrast",
]
