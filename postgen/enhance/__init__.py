"""Enhance-A-Video (arXiv:2502.07508) on every video transformer that `postgen.families` knows.

Each video self-attention is multiplied by a gain that grows with how much the frames attend to one another. Nothing is
trained, no weight changes, and removing it gives the model back bit by bit.
"""

from postgen.enhance.apply import (
    EnhanceAVideoHandle,
    apply_enhance_a_video,
    enhance_for_call,
    handle_of,
    remove_enhance_a_video,
)
from postgen.enhance.config import EnhanceAVideoConfig
from postgen.enhance.recommended import OTHERS, RECOMMENDED, Recommendation, recommended_weight

__all__ = [
    "OTHERS",
    "RECOMMENDED",
    "EnhanceAVideoConfig",
    "EnhanceAVideoHandle",
    "Recommendation",
    "apply_enhance_a_video",
    "enhance_for_call",
    "handle_of",
    "recommended_weight",
    "remove_enhance_a_video",
]
