"""The knowledge of postgen about each diffusers architecture.

Methods take this knowledge from here and never name a model class. A layout is a data row for a transformer class. A
denoiser is a small class for a pipeline class. `postgen.families.recording` records blocks and runs single blocks.
This package does not import it, because it needs torch.
"""

from postgen.families.blocks import Block, BlockGroup, Blocks
from postgen.families.denoiser import (
    Condition,
    Denoiser,
    ExpertDenoiser,
    PredictionType,
    RoundingDenoiser,
    VarianceDenoiser,
)
from postgen.families.layout import Call, Layout
from postgen.families.registry import (
    blocks_of,
    denoiser_for,
    layout_named,
    layout_of,
    register_denoiser,
    register_layout,
    tokens_named,
    tokens_of,
    video_tokens_named,
    video_tokens_of,
)
from postgen.families.video_tokens import Grid, VideoTokens

__all__ = [
    "Block",
    "BlockGroup",
    "Blocks",
    "Call",
    "Condition",
    "Denoiser",
    "ExpertDenoiser",
    "Grid",
    "Layout",
    "PredictionType",
    "RoundingDenoiser",
    "VarianceDenoiser",
    "VideoTokens",
    "blocks_of",
    "denoiser_for",
    "layout_named",
    "layout_of",
    "register_denoiser",
    "register_layout",
    "tokens_named",
    "tokens_of",
    "video_tokens_named",
    "video_tokens_of",
]
