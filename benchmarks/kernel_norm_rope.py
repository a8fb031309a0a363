"""Norm and rotation of queries and keys in other packages: diffusers' code and the two kernels of liger.

The arguments are q and k (B, N, H, D), their weights and biases, and cos and sin (N, 1 or H, D), which hold every
angle twice as in diffusers.
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
    """Return the norm of the model whose name starts the name of the shape."""
    if shape.startswith(("Wan", "LTX")):
        return "rms_norm_across_heads"
    return "layer_norm" if shape.startswith("CogVideoX") else "rms_norm"


def ours(norm: str) -> Callable[..., Any]:
    """Return a function that calls our operation with the tables of diffusers."""

    def call(q: Tensor, k: Tensor, *rest: Tensor) -> Any:
        *affine, cos, sin = rest
        cos, sin = (table[None, ..., ::2] for table in (cos, sin))
        return qk_norm_rope(q, k, None, cos, sin, *affine, eps=EPS, norm=norm)

    return call


def exact(norm: str) -> Callable[..., Pair]:
    """Return a function that computes the reference."""

    def call(q: Tensor, k: Tensor, *rest: Tensor) -> Pair:
        *affine, cos, sin = rest
        cos, sin = (table[None, ..., ::2] for table in (cos, sin))
        found = [naive.norm_rope(x, cos, sin, *affine[i::2], eps=EPS, norm=norm) for i, x in enumerate((q, k))]
        return found[0], found[1]

    return call


def official(norm: str) -> Callable[..., Pair]:
    """Return a function that computes norm and rotation as the attention processors of diffusers do."""

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
    """Rotate pairs of adjacent channels in float32, as `apply_rotary_emb` of diffusers does."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-b, a], dim=-1).flatten(3)
    return (x.float() * cos + across.float() * sin).to(x.dtype)


def peers(norm: str, *, table_heads: int) -> dict[str, Callable[..., Any]]:
    """Return the installed kernels of other packages that support this norm and these tables."""
    if norm == "layer_norm" or table_heads > 1 or importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction

    def liger(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Any:
        """Run liger's kernels, which rotate halves instead of adjacent pairs: other results, but the same bytes."""
        normed = []
        for x, weight in ((q, q_weight), (k, k_weight)):
            rows = x.view(-1, weight.shape[0])
            out = LigerRMSNormFunction.apply(rows, weight, EPS, 0.0, "llama", False)
            normed.append(out.view_as(x).transpose(1, 2))
        return LigerRopeFunction.apply(*normed, cos[None, :, 0], sin[None, :, 0])

    return {"liger": liger}
