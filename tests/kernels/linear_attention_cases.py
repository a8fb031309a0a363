"""Test inputs for linear attention: values with a mean, as in real models, and cases for every option."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from postgen.kernels.linear_attention.naive import Terms, rope_table

CASES = (
    "plain", "elu", "rope", "norm", "norm across heads", "conv", "shared conv in time", "lengths", "state", "all",
    "text before and after", "text and all",
)  # fmt: skip


def inputs(
    shape: Sequence[int],
    *,
    keys: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values (B, N, H, D); the last two are views of one fused projection."""
    generator = torch.Generator(device).manual_seed(seed)
    batch, tokens, heads, channels = shape
    keys = tokens if keys is None else keys
    fused = torch.randn(batch, keys, 3, heads, channels, generator=generator, device=device)
    fused[:, :, 2] += 0.5
    fused = fused.to(dtype)
    if keys == tokens:
        return fused[:, :, 0], fused[:, :, 1], fused[:, :, 2]
    query = torch.randn(batch, tokens, heads, channels, generator=generator, device=device).to(dtype)
    return query, fused[:, :, 1], fused[:, :, 2]


def pairs(channels: int) -> tuple[int, int, int]:
    """Return how many channel pairs of a head Wan rotates by frame, by row and by column."""
    rows = channels // 6
    return channels // 2 - 2 * rows, rows, rows


def rope(grid: Sequence[int], channels: int, device: str = "cpu") -> Tensor:
    axes = []
    for length, count in zip(grid, pairs(channels), strict=True):
        frequencies = 10000.0 ** -(torch.arange(count, dtype=torch.float64) / max(count, 1))
        axes.append(torch.outer(torch.arange(length, dtype=torch.float64), frequencies))
    return rope_table(*axes).to(device)


def terms(case: str, shape: Sequence[int], grid: tuple[int, int, int], device: str = "cpu") -> Terms:
    generator = torch.Generator(device).manual_seed(7)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    batch, tokens, heads, channels = shape
    beside: dict[str, int] = {}
    if case.startswith("text"):
        grid = (*grid[:2], grid[2] - 1)
        text = tokens - math.prod(grid)
        beside = {"text_first": text // 3, "text_last": text - text // 3}
    turned = {"grid": grid, "rope": rope(grid, channels, device), "rope_pairs": pairs(channels)}
    across = {
        "qk_norm": "rms_norm_across_heads",
        "query_weight": normal(heads * channels),
        "key_weight": normal(heads * channels),
    }
    conv = {"grid": grid, "conv_space": normal(heads * channels, 5, 5) / 5, "conv_time": normal(heads * channels, 3)}
    lengths = {"key_lengths": torch.arange(batch, device=device) * (tokens // 2) + tokens // 3}
    state = {
        "state": normal(batch, heads, channels, channels),
        "key_sum": normal(batch, heads, channels).abs() * tokens**0.5,
    }
    every: dict[str, dict[str, Any]] = {
        "plain": {},
        "elu": {"feature_map": "elu"},
        "rope": turned,
        "norm": {"qk_norm": "rms_norm", "query_weight": normal(channels), "norm_eps": 1e-3},
        "norm across heads": across,
        "conv": conv,
        "shared conv in time": {"grid": grid, "conv_time": normal(channels, 3)},
        "lengths": lengths,
        "state": state,
        "all": {
            **turned,
            **across,
            **lengths,
            **state,
            "feature_map": "elu",
            "conv_space": normal(channels, 3, 3) / 3,
            "conv_time": normal(channels, 3),
        },
    }
    every |= {"text before and after": {**turned, **conv, **beside}, "text and all": {**every["all"], **beside}}
    return Terms(**every[case])


def in_float64(given: Terms) -> Terms:
    values = {field.name: getattr(given, field.name) for field in fields(given)}
    tensors = {name: x.double() for name, x in values.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return replace(given, **tensors)


def worst_head(found: Tensor, expected: Tensor) -> float:
    """Return the largest relative L2 error among samples and heads of (B, N, H, D)."""
    expected = expected.double()
    difference = (found.double() - expected).square().sum(dim=(1, 3)).sqrt()
    return float((difference / expected.square().sum(dim=(1, 3)).sqrt().clamp(min=1e-30)).max())


def off_mean(out: Tensor, value: Tensor) -> Tensor:
    """Subtract the mean value from a result; with diffuse attention the mean value is nearly the whole result."""
    return out.double() - value.double().mean(dim=1, keepdim=True)
