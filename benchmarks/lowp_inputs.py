"""Random queries, keys and values that are easy or hard to round to 8 bits, for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("normal", "hard", "clustered")
"""normal: all numbers are N(0, 1). hard: four channels of the keys are 8 times as wide, and all keys of a head share
an offset of 4 N(0, 1). clustered: tokens are close to 64 centres, like tokens of smooth regions of a video."""
_CENTRES = 64


def drawn(
    kind: str,
    tokens: int,
    heads: int,
    channels: int,
    *,
    batch: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw random queries, keys and values, each (B, N, H, D).

    Raises:
        ValueError: the kind is not one of `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}. Known: {', '.join(KINDS)}")
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    query, key, value = (normal(batch, tokens, heads, channels) for _ in range(3))
    if kind == "hard":
        key[..., torch.randperm(channels, generator=generator, device=device)[:4]] *= 8
        key += 4 * normal(1, 1, heads, channels)
    if kind == "clustered":
        places = torch.randint(0, _CENTRES, (2, tokens), generator=generator, device=device)
        centres, values = normal(_CENTRES, heads, channels), normal(_CENTRES, heads, channels)
        query = 2 * centres[places[0]] + 0.3 * query
        key = 2 * centres[places[1]] + 0.3 * key
        value = values[places[1]] + 0.3 * value + 0.5
    return query.to(dtype), key.to(dtype), value.to(dtype)
