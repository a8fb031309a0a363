"""Enhance-A-Video (arXiv:2502.07508) for every video transformer that `postgen.families` knows.

The output of each video self-attention is multiplied by a gain. The gain grows with the attention between different
frames. The method needs no training and changes no weight; after its removal the model computes the same bits as
before.
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
