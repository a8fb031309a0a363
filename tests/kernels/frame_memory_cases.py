"""Test inputs for frame-wise memories: tokens, gates and a memory for each frame."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-5


class Case(NamedTuple):
    """The inputs of `frame_sums`, `frame_reads` and `gated_sum`."""

    query: Tensor
    key: Tensor
    value: Tensor
    strength: Tensor
    gate: Tensor
    memory: Tensor
    weight: Tensor
    frames: int

    def double(self) -> Case:
        """Return the case in float64."""
        *tensors, frames = self
        return Case(*(each.double() for each in tensors if isinstance(each, Tensor)), frames)


def case(
    frames: int, places: int, heads: int, channels: int, dtype: torch.dtype, device: str = "cpu", batch: int = 2
) -> Case:
    """Return a case of strided views of one projection; as in trained models, the values have a mean."""
    generator = torch.Generator(device).manual_seed(places)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    qkv = drawn(batch, frames * places, 3, heads, channels)
    qkv[:, :, 2] += 0.5
    query, key, value = qkv.to(dtype).unbind(2)
    return Case(
        query,
        key,
        value,
        drawn(batch, frames * places, heads).to(dtype),
        drawn(batch, frames * places, heads, channels).to(dtype),
        drawn(batch, frames, heads, channels, channels),
        drawn(channels),
        frames,
    )


def writes(
    frames: int, channels: int, heads: int = 2, device: str = "cpu", batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Return inverses (B, F, H, D, D), content (B, F, H, D, D) and log decays (B, F, H, D) of frames."""
    generator = torch.Generator(device).manual_seed(frames)
    shape = (batch, frames, heads, channels, channels)
    content, root = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    inverse = torch.linalg.inv(torch.eye(channels, device=device) + root @ root.mT / channels)
    return inverse, content, -torch.rand(shape[:4], generator=generator, device=device)
