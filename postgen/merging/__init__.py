"""Merging of checkpoints and of LoRA files."""

from .lora import merge_loras
from .merge import merge
from .methods import METHODS, MergeConfig
from .power_average import PowerAverage
from .report import MergeReport
from .stream import Rule, merge_tensors

__all__ = ["METHODS", "MergeConfig", "MergeReport", "PowerAverage", "Rule", "merge", "merge_loras", "merge_tensors"]
