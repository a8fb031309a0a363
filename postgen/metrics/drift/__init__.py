"""How a long clip drifts from what it should be: exact measures where the true clip is known.

They know no model and no world, only tensors. docs/drift.md says what each number means and which a frozen video wins.
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
