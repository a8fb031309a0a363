"""Training of a prompt enhancer: data for supervised fine-tuning, and rewards for GRPO of TRL."""

from postgen.prompt.training.pairs import SftPairs, to_rl_rows, to_sft_pairs
from postgen.prompt.training.similarity import SimilarityReward
from postgen.prompt.training.structure import StructureReward
from postgen.prompt.training.video import Counts, VideoGenerationReward

__all__ = [
    "Counts",
    "SftPairs",
    "SimilarityReward",
    "StructureReward",
    "VideoGenerationReward",
    "to_rl_rows",
    "to_sft_pairs",
]
