"""What postgen knows of each diffusers architecture. Methods ask here and never name a model class.

A layout is a data row per transformer class, a denoiser is a small class per pipeline class.
"""

from postgen.families.denoiser import Condition, Denoiser, PredictionType
from postgen.families.layout import Grid, Layout
from postgen.families.registry import denoiser_for, layout_named, layout_of, register_denoiser, register_layout

__all__ = [
    "Condition",
    "Denoiser",
    "Grid",
    "Layout",
    "PredictionType",
    "denoiser_for",
    "layout_named",
    "layout_of",
    "register_denoiser",
    "register_layout",
]
