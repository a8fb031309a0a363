"""Apply FP8 attention to a pipeline or a transformer, change its settings and remove it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families import video_tokens_named
from postgen.families.attention import dispatch
from postgen.families.handle import PlugInHandle
from postgen.families.installed import transformers_of
from postgen.families.progress import PipelineProgress
from postgen.fused.fp8_attention.available import check_available
from postgen.fused.fp8_attention.config import FP8AttentionConfig
from postgen.fused.fp8_attention.state import NAME, FP8Attention
from postgen.kernels.attention_fp8.ops import NAME as BACKEND
from postgen.kernels.attention_fp8.ops import attention_fp8


class FP8AttentionHandle(PlugInHandle[FP8AttentionConfig, FP8Attention]):
    """The handle of FP8 attention on one or more transformers."""

    name = NAME
    config_class = FP8AttentionConfig
    removed = "FP8 attention was removed: apply it again"
    doubled = "FP8 attention is on {where} already: update or remove it"

    def stats(self) -> dict[str, dict[str, int]]:
        """Return the numbers of FP8 layers (`fp8`) and exact layers (`exact`), by pipeline component.

        `not_finite` is the number of outputs with NaN or infinity that `debug` found in this process.
        """
        return {part: plug_in.counts() for part, (_, plug_in) in self.still_on.items()}


def apply_fp8_attention(target: Any, config: FP8AttentionConfig | None = None) -> FP8AttentionHandle:
    """Run self-attention over the video in FP8 (E4M3) with cuDNN, in the steps and layers that the config selects.

    Exact transformations of queries, keys and values before the rounding lower its error
    (`postgen.kernels.attention_fp8.preparation`). Cross-attention stays exact. Calls with a mask and calls that cuDNN
    does not support stay exact too, with one warning per reason.

    Args:
        target: a diffusers video pipeline (all its transformers are changed) or a transformer.
        config: the settings; None is the default config.

    Returns:
        The handle that enables, disables, updates and removes FP8 attention.

    Raises:
        UserError: the model is unknown, there is no GPU of compute capability 9.0 or later, `nvidia-cudnn-frontend` is
            not installed, cuDNN does not support the number of channels per head, no layer matches a pattern of the
            config, all layers stay exact, or FP8 attention is already on this model.

    Example:
        report = calibrate_fp8_attention(pipe, ["a ball rolls", "a red cube falls"])
        handle = apply_fp8_attention(pipe, report.config())
    """
    settings = FP8AttentionHandle.settings(config)
    progress = progress_of(target)
    return FP8AttentionHandle.attach(target, lambda model: FP8Attention(model, settings, progress))


def remove_fp8_attention(target: Any) -> None:
    """Remove FP8 attention from a pipeline or transformer, which restores the model bit by bit.

    Raises:
        UserError: the model has no FP8 attention.
    """
    handle = FP8AttentionHandle.of(target)
    if handle is None:
        raise UserError(f"FP8 attention is not on this {type(target).__name__}")
    handle.remove()


def fp8_attention_for_call(target: Any, setting: FP8AttentionConfig | bool | None) -> AbstractContextManager[None]:
    """Set FP8 attention for the calls inside a `with` block; the earlier state returns after the block.

    Args:
        target: a pipeline or transformer.
        setting: None changes nothing, False or 0 disables FP8 attention, True uses the default config, and a config
            is used unchanged.

    Raises:
        UserError: for the same reasons as in `apply_fp8_attention`.
    """
    progress = None if setting is None else progress_of(target)

    def make(model: nn.Module, settings: FP8AttentionConfig) -> FP8Attention:
        assert progress is not None
        return FP8Attention(model, settings, progress)

    return FP8AttentionHandle.for_call(target, setting, make)


def check_known(transformer: str) -> None:
    """Check that the self-attention modules over the video are known for a transformer class.

    Args:
        transformer: the name of the class.

    Raises:
        UserError: the class is unknown; the message lists the known classes.
    """
    video_tokens_named(transformer)


def progress_of(target: Any) -> PipelineProgress:
    """Return the object that reads the current denoising step of a pipeline or transformer."""
    return PipelineProgress(None if "" in transformers_of(target) else target, who="FP8 attention")


def register_fp8_attention_backend() -> Any:
    """Register "cudnn_fp8" as an attention backend of diffusers; a second call changes nothing.

    The backend computes self-attention in every step and in every layer for which it is set. diffusers' native backend
    computes calls with a mask, causal calls and cross-attention, which has different numbers of queries and keys.

    Returns:
        The object that diffusers keeps on processors as `_attention_backend`.

    Raises:
        UserError: this machine cannot compute FP8 attention, or the attention dispatcher of the installed diffusers
            is not the expected one.
    """
    check_available()
    return dispatch.register_attention_backend(BACKEND, backend_attention)


def backend_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> Tensor | None:
    """Compute self-attention in FP8, or return None for calls that diffusers must compute.

    Args:
        query: (B, N, H, D).
        key: (B, N, H, D).
        value: (B, N, H, D).
        attn_mask: None; diffusers computes calls with a mask.
        scale: factor of the logits; None is D ** -0.5.

    Returns:
        (B, N, H, D), or None.
    """
    if attn_mask is not None or query.shape[1] != key.shape[1] or query.shape[2] != key.shape[2]:
        return None
    return attention_fp8(query, key, value, scale=scale)
