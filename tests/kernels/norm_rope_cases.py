"""Test inputs for norm and rotation of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Which arguments a test case has, and their layout."""

    norm: str = "rms_norm"
    half: bool = False
    table_heads: bool = False
    """Whether every head has its own table, as in LTX."""
    rotated: float = 1.0
    """The share of the tokens that are rotated; these are the last tokens."""
    affine: bool = True
    bias: bool = False
    shift: bool = False
    values: bool = False
    key_heads: int | None = None
    """The number of key heads; None is the number of query heads."""


KINDS = {
    "Wan": Kind(norm="rms_norm_across_heads"),
    "HunyuanVideo": Kind(norm="rms_norm", rotated=0.75),
    "CogVideoX": Kind(norm="layer_norm", bias=True, rotated=0.5),
    "LTX": Kind(norm="rms_norm_across_heads", table_heads=True),
    "half, shifted": Kind(norm="rms_norm", half=True, shift=True, values=True),
    "grouped": Kind(norm="rms_norm_across_heads", key_heads=1, values=True),
    "norm only": Kind(norm="rms_norm", affine=False, rotated=0.0),
    "rotation only": Kind(norm="none", affine=False, shift=True),
}


@dataclass(kw_only=True)
class Case:
    """Tensors by argument name, and options."""

    tensors: dict[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)

    def of(self, name: str) -> dict[str, Any]:
        """Arguments of `naive.norm_rope` for "q" or "k"."""
        own = {key: self.tensors[f"{name}_{key}"] for key in ("weight", "bias")}
        shift = self.tensors["k_shift"] if name == "k" else None
        tables = {key: self.tensors[key] for key in ("cos", "sin")}
        return {"x": self.tensors[name], **tables, **own, "shift": shift, **self.options}

    def in_float64(self) -> Case:
        tensors = {name: None if x is None else x.double() for name, x in self.tensors.items()}
        return Case(tensors=tensors, options=self.options)


def make(
    name: str,
    shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype = torch.float32,
    affine: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """Return a case whose queries and keys are views of one fused QKV projection, with outliers in some channels."""
    kind, (batch, tokens, heads, channels) = KINDS[name], shape
    key_heads = kind.key_heads or heads
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, to: torch.dtype = affine) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(to)

    qkv = normal(batch, tokens, (heads + 2 * key_heads) * channels, to=torch.float32) * 2 + 0.3
    qkv[..., :: channels // 2] *= 5
    q, k, v = qkv.to(dtype).unflatten(-1, (-1, channels)).split([heads, key_heads, key_heads], dim=2)
    rotated = int(tokens * kind.rotated)
    cos = sin = None
    if rotated:
        angles = normal(1, rotated, heads if kind.table_heads else 1, channels // 2, to=torch.float32) * 3
        # As in diffusers, the tables hold every number twice, and every second number is read.
        cos, sin = (table.repeat_interleave(2, dim=-1)[..., ::2] for table in (angles.cos(), angles.sin()))
    row, key_row = (n * channels if kind.norm == "rms_norm_across_heads" else channels for n in (heads, key_heads))
    tensors = {
        "q": q,
        "k": k,
        "v": v if kind.values else None,
        "cos": cos,
        "sin": sin,
        "q_weight": normal(row) if kind.affine else None,
        "k_weight": normal(key_row) if kind.affine else None,
        "q_bias": normal(row) if kind.bias else None,
        "k_bias": normal(key_row) if kind.bias else None,
        "k_shift": normal(batch, key_heads, channels) if kind.shift else None,
    }
    options = {"eps": 1e-6, "norm": kind.norm, "half": kind.half, "first_token": tokens - rotated}
    return Case(tensors=tensors, options=options)
