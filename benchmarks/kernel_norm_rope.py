"""Norm and rotation of queries and keys as others compute them: diffusers' lines, and liger's two kernels.

Arguments are q, k (B, N, H, D), their weights and biases, cos and sin (N, 1 or H, D) with every angle twice, as
diffusers makes them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postgen.kernels.qk_norm_rope import naive
from postgen.kernels.qk_norm_rope.ops import qk_norm_rope

EPS = 1e-6
Pair = tuple[Tensor, Tensor]


def norm_of(shape: str) -> str:
    """Return the norm of a model, by the name of its shape."""
    if shape.startswith(("Wan", "LTX")):
        return "rms_norm_across_heads"
    return "layer_norm" if shape.startswith("CogVideoX") else "rms_norm"


def ours(norm: str) -> Callable[..., Any]:
    """Return the operation, on the tables of diffusers as they are."""

    def call(q: Tensor, k: Tensor, *rest: Tensor) -> Any:
        *affine, cos, sin = rest
        cos, sin = (table[None, ..., ::2] for table in (cos, sin))
        return qk_norm_rope(q, k, None, cos, sin, *affine, eps=EPS, norm=norm)

    return call


def exact(norm: str) -> Callable[..., Pair]:
    """Return the reference."""

    def call(q: Tensor, k: Tensor, *rest: Tensor) -> Pair:
        *affine, cos, sin = rest
        cos, sin = (table[None, ..., ::2] for table in (cos, sin))
        found = [naive.norm_rope(x, cos, sin, *affine[i::2], eps=EPS, norm=norm) for i, x in enumerate((q, k))]
        return found[0], found[1]

    return call


def official(norm: str) -> Callable[..., Pair]:
    """Return what the attention processors of diffusers compute."""

    def call(q: Tensor, k: Tensor, *rest: Tensor) -> Pair:
        *affine, cos, sin = rest
        found = []
        for i, x in enumerate((q, k)):
            rows = x.flatten(2) if norm == "rms_norm_across_heads" else x
            width = rows.shape[-1:]
            if norm == "layer_norm":
                rows = F.layer_norm(rows, width, *affine[i::2], eps=EPS)
            else:
                rows = F.rms_norm(rows, width, affine[i], EPS)
            found.append(_turned(rows.reshape(x.shape), cos, sin))
        return found[0], found[1]

    return call


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary_emb` of diffusers: pairs of neighbours, in float32."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-b, a], dim=-1).flatten(3)
    return (x.float() * cos + across.float() * sin).to(x.dtype)


def peers(norm: str, *, table_heads: int) -> dict[str, Callable[..., Any]]:
    """Return kernels of others that are installed and take this norm and one table for all heads."""
    if norm == "layer_norm" or table_heads > 1 or importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction

    def liger(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Any:
        """It rotates halves instead of neighbours: as many bytes, other numbers."""
        normed = []
        for x, weight in ((q, q_weight), (k, k_weight)):
            rows = x.view(-1, weight.shape[0])
            out = LigerRMSNormFunction.apply(rows, weight, EPS, 0.0, "llama", False)
            normed.append(out.view_as(x).transpose(1, 2))
        return LigerRopeFunction.apply(*normed, cos[None, :, 0], sin[None, :, 0])

    return {"liger": liger}
