"""The official formula of Enhance-A-Video, step by step as the paper and its code say it, independent of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import postgen
from tests.families.tiny_models import tiny_model

# Where the 4 * 6 video tokens stand among 5 text tokens.
_FIRST, _ALONE, _LAST = slice(None, 24), slice(None), slice(5, None)
MODELS = {
    "CogVideoX 1.0": _LAST,
    "CogVideoX 1.5": _LAST,
    "HunyuanVideo": _FIRST,
    "LTX": _ALONE,
    "Wan": _ALONE,
}
"""Tiny models, and their video tokens among all tokens of attention."""


def cfi(query: Tensor, key: Tensor, frames: int) -> Tensor:
    """Cross-frame intensity: one number for (B, heads, T*S, D) queries and keys of the video tokens."""
    batch, heads, tokens, channels = query.shape

    def temporal(x: Tensor) -> Tensor:
        x = x.reshape(batch, heads, frames, tokens // frames, channels)
        return x.permute(0, 3, 1, 2, 4).reshape(-1, heads, frames, channels)

    q, k = temporal(query) * channels**-0.5, temporal(key)
    attention = (q @ k.transpose(-2, -1)).float().softmax(dim=-1)
    diagonal = torch.eye(frames, dtype=torch.bool)
    off_diagonal = attention.masked_fill(diagonal, 0)
    return (off_diagonal.sum(dim=(-2, -1)) / (frames * frames - frames)).mean()


@contextmanager
def official(transformer: nn.Module, modules: list[str], video: slice, frames: int, weight: float) -> Iterator[None]:
    """Multiply the video output of attention modules by the official gain.

    Args:
        transformer: the model.
        modules: names of its self-attention modules.
        video: where the video tokens are among all tokens.
        frames: T.
        weight: the official weight.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    original = F.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((query[:, :, video], key[:, :, video]))
        return original(query, key, *args, **kwargs)

    def forget(module: nn.Module, args: Any) -> None:
        seen.clear()

    def scale(module: nn.Module, args: Any, output: Any) -> Any:
        (query, key), *_ = seen
        gain = (cfi(query, key, frames) * (frames + weight)).clamp(min=1)
        return (output[0] * gain, *output[1:]) if isinstance(output, tuple) else output * gain

    hooks = []
    for name in modules:
        module = transformer.get_submodule(name)
        hooks += [module.register_forward_pre_hook(forget), module.register_forward_hook(scale)]
    F.scaled_dot_product_attention = record
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
        for hook in hooks:
            hook.remove()


def parity(name: str, weight: float = 4.0) -> tuple[float, float]:
    """Return the largest difference between ours and the official one, and what the official one changes at all."""
    tiny = tiny_model(name, batch=2)
    plain = tiny()
    config = postgen.EnhanceAVideoConfig(weight=weight, reduction="batch")
    handle = postgen.apply_enhance_a_video(tiny.transformer, config)
    ours, layers = tiny(), list(handle.stats())
    handle.remove()
    with official(tiny.transformer, layers, MODELS[name], tiny.frames, weight):
        theirs = tiny()
    return float((ours - theirs).abs().max()), float((theirs - plain).abs().max())
