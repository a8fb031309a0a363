"""Put FP8 attention on a pipeline or a transformer, change it, take it off."""

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
    """FP8 attention as it stands on one or more transformers."""

    name = NAME
    config_class = FP8AttentionConfig
    removed = "FP8 attention was removed: apply it again"
    doubled = "FP8 attention is on {where} already: update or remove it"

    def stats(self) -> dict[str, dict[str, int]]:
        """Return in how many layers it is on and how many stay exact, by component of the pipeline.

        `not_finite` counts the outputs that `debug` found not finite, in this process.
        """
        return {part: plug_in.counts() for part, (_, plug_in) in self.still_on.items()}


def apply_fp8_attention(target: Any, config: FP8AttentionConfig | None = None) -> FP8AttentionHandle:
    """Let self-attention over the video run in E4M3 by cuDNN, in the steps and layers that the settings leave to it.

    Inputs are prepared by exact changes that lower the error (`postgen.kernels.attention_fp8.preparation`). Calls that
    cuDNN does not take, cross-attention and masked calls stay as they were; the former two give one warning.

    Args:
        target: a diffusers video pipeline (all its transformers are taken) or a transformer.
        config: the settings; None is the usual ones.

    Returns:
        The handle to switch, change and remove it.

    Raises:
        UserError: an unknown model, no GPU of compute capability 9.0 or later, `nvidia-cudnn-frontend` is missing,
            heads that cuDNN does not take, a pattern that no layer matches, or it is on already.

    Example:
        report = calibrate_fp8_attention(pipe, ["a ball rolls", "a red cube falls"])
        handle = apply_fp8_attention(pipe, report.config())
    """
    settings = FP8AttentionHandle.settings(config)
    progress = progress_of(target)
    return FP8AttentionHandle.attach(target, lambda model: FP8Attention(model, settings, progress))


def remove_fp8_attention(target: Any) -> None:
    """Take FP8 attention off a pipeline or transformer: it is as before, bit by bit.

    Raises:
        UserError: it is not on.
    """
    handle = FP8AttentionHandle.of(target)
    if handle is None:
        raise UserError(f"FP8 attention is not on this {type(target).__name__}")
    handle.remove()


def fp8_attention_for_call(target: Any, setting: FP8AttentionConfig | bool | None) -> AbstractContextManager[None]:
    """Set FP8 attention for the calls in a block; afterwards it is as it was before.

    Args:
        target: a pipeline or transformer.
        setting: None leaves it as it is; False or 0 switches it off; True is the usual settings; a config is taken as
            it is.

    Raises:
        UserError: as `apply_fp8_attention`.
    """
    progress = None if setting is None else progress_of(target)

    def make(model: nn.Module, settings: FP8AttentionConfig) -> FP8Attention:
        assert progress is not None
        return FP8Attention(model, settings, progress)

    return FP8AttentionHandle.for_call(target, setting, make)


def check_known(transformer: str) -> None:
    """Refuse a transformer class, by its name, of which it is not known where its video attends to itself.

    Raises:
        UserError: it names those that are known.
    """
    video_tokens_named(transformer)


def progress_of(target: Any) -> PipelineProgress:
    """Return what reads the step off the pipeline that is running."""
    return PipelineProgress(None if "" in transformers_of(target) else target, who="FP8 attention")


def register_fp8_attention_backend() -> Any:
    """Make "cudnn_fp8" a name that diffusers' `set_attention_backend` knows; a second time changes nothing.

    It computes self-attention in every step and layer that it is set for; masks, causal calls and cross-attention,
    told by another number of keys than queries, are left to diffusers' native backend.

    Returns:
        diffusers' own object for the name.

    Raises:
        UserError: this machine computes no FP8 attention, or the installed diffusers has another attention dispatcher.
    """
    check_available()
    return dispatch.register_attention_backend(BACKEND, backend_attention)


def backend_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> Tensor | None:
    """Return self-attention (B, N, H, D) in E4M3, or None for calls that are left to diffusers."""
    if attn_mask is not None or query.shape[1] != key.shape[1] or query.shape[2] != key.shape[2]:
        return None
    return attention_fp8(query, key, value, scale=scale)
