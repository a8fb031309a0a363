"""Self-attention of stock diffusers transformers in E4M3, by step and layer, with what it costs measured before.

cuDNN computes it on Hopper and later (`postgen.kernels.attention_fp8`). It is never on unless it was asked for: the
first and last steps and the layers that calibration finds sensitive stay exact.
"""

from postgen.fused.fp8_attention.apply import (
    FP8AttentionHandle,
    apply_fp8_attention,
    check_known,
    fp8_attention_for_call,
    register_fp8_attention_backend,
    remove_fp8_attention,
)
from postgen.fused.fp8_attention.calibrate import calibrate_fp8_attention
from postgen.fused.fp8_attention.config import FP8AttentionConfig
from postgen.fused.fp8_attention.report import FP8AttentionReport

__all__ = [
    "FP8AttentionConfig",
    "FP8AttentionHandle",
    "FP8AttentionReport",
    "apply_fp8_attention",
    "calibrate_fp8_attention",
    "check_known",
    "fp8_attention_for_call",
    "register_fp8_attention_backend",
    "remove_fp8_attention",
]
