"""Self-attention of stock diffusers transformers in FP8 (E4M3), selected by denoising step and layer.

cuDNN computes FP8 attention on Hopper and later GPUs (`postgen.kernels.attention_fp8`). FP8 attention is off unless
the user applies it. The first and last steps stay exact, and so do the layers that calibration finds sensitive;
calibration measures the error of each layer beforehand.
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
