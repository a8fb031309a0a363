"""postgen makes a trained diffusers video model better, faster and longer, without forking it.

This module imports nothing heavy. A public name is imported from its module when it is first used, so `import postgen`
takes a few milliseconds and imports neither torch nor diffusers. It registers postgen's quantisation with diffusers,
which needs it to load a quantised checkpoint.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from postgen.compat.quantizers import register_quantizer

if TYPE_CHECKING:
    from postgen.assets import embedded_model as embedded_model
    from postgen.enhance import EnhanceAVideoConfig as EnhanceAVideoConfig
    from postgen.enhance import EnhanceAVideoHandle as EnhanceAVideoHandle
    from postgen.enhance import apply_enhance_a_video as apply_enhance_a_video
    from postgen.enhance import remove_enhance_a_video as remove_enhance_a_video
    from postgen.errors import UserError as UserError
    from postgen.families.summary import summary as summary
    from postgen.fp8_linear import FP8LinearConfig as FP8LinearConfig
    from postgen.fp8_linear import apply_fp8_linears as apply_fp8_linears
    from postgen.fp8_linear import remove_fp8_linears as remove_fp8_linears
    from postgen.fused import FusedOpsConfig as FusedOpsConfig
    from postgen.fused import FusedOpsHandle as FusedOpsHandle
    from postgen.fused import apply_fused_ops as apply_fused_ops
    from postgen.fused import remove_fused_ops as remove_fused_ops
    from postgen.fused.attention import register_attention_backend as register_attention_backend
    from postgen.fused.attention import routed_attention as routed_attention
    from postgen.fused.fp8_attention import FP8AttentionConfig as FP8AttentionConfig
    from postgen.fused.fp8_attention import apply_fp8_attention as apply_fp8_attention
    from postgen.fused.fp8_attention import remove_fp8_attention as remove_fp8_attention
    from postgen.grpo.nft import DiffusionNFTTrainer as DiffusionNFTTrainer
    from postgen.grpo.trainer import DanceGRPOConfig as DanceGRPOConfig
    from postgen.grpo.trainer import DanceGRPOTrainer as DanceGRPOTrainer
    from postgen.quant.hf import PostgenQuantConfig as PostgenQuantConfig
    from postgen.video import VideoError as VideoError
    from postgen.video import VideoInfo as VideoInfo
    from postgen.video import contact_sheet as contact_sheet
    from postgen.video import iter_video as iter_video
    from postgen.video import probe as probe
    from postgen.video import read_video as read_video
    from postgen.video import side_by_side as side_by_side
    from postgen.video import write_video as write_video

__version__ = "0.1.0"
"""Version of the package."""

_HOMES = {
    "DanceGRPOConfig": "postgen.grpo.trainer",
    "DanceGRPOTrainer": "postgen.grpo.trainer",
    "DiffusionNFTTrainer": "postgen.grpo.nft",
    "EnhanceAVideoConfig": "postgen.enhance",
    "EnhanceAVideoHandle": "postgen.enhance",
    "FP8AttentionConfig": "postgen.fused.fp8_attention",
    "FP8LinearConfig": "postgen.fp8_linear",
    "FusedOpsConfig": "postgen.fused",
    "FusedOpsHandle": "postgen.fused",
    "PostgenQuantConfig": "postgen.quant.hf",
    "UserError": "postgen.errors",
    "VideoError": "postgen.video",
    "VideoInfo": "postgen.video",
    "apply_enhance_a_video": "postgen.enhance",
    "apply_fp8_attention": "postgen.fused.fp8_attention",
    "apply_fp8_linears": "postgen.fp8_linear",
    "apply_fused_ops": "postgen.fused",
    "contact_sheet": "postgen.video",
    "embedded_model": "postgen.assets",
    "iter_video": "postgen.video",
    "probe": "postgen.video",
    "read_video": "postgen.video",
    "register_attention_backend": "postgen.fused.attention",
    "remove_enhance_a_video": "postgen.enhance",
    "remove_fp8_attention": "postgen.fused.fp8_attention",
    "remove_fp8_linears": "postgen.fp8_linear",
    "remove_fused_ops": "postgen.fused",
    "routed_attention": "postgen.fused.attention",
    "side_by_side": "postgen.video",
    "summary": "postgen.families.summary",
    "write_video": "postgen.video",
}

__all__ = ["__version__", *_HOMES]

# diffusers can load checkpoints that postgen has quantised, once this package is imported.
register_quantizer("postgen", "postgen.quant.hf", "PostgenQuantizer", "PostgenQuantConfig")


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'postgen' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
