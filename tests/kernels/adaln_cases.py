"""Test inputs for the norms around a layer, and diffusers' computation of these norms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("per sample", "per token", "affine", "plain", "all")


def inputs(
    kind: str,
    shape: tuple[int, int, int],
    *,
    dtype: torch.dtype = torch.float32,
    modulation: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Tensor | None]:
    """Return x, y, gate, scale, shift, weight and bias; the mean of x is not 0, as in real models."""
    generator = torch.Generator(device).manual_seed(sum(shape))

    def normal(*size: int, dtype: torch.dtype = modulation) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    batch, tokens, channels = shape
    rows = (batch, tokens if kind in ("per token", "all") else 1, channels)
    modulated, affine = kind not in ("affine", "plain"), kind in ("affine", "all")
    return {
        "x": (normal(*shape, dtype=torch.float32) * 3 + 2).to(dtype),
        "y": normal(*shape, dtype=dtype),
        "gate": normal(*rows) if modulated else None,
        "scale": normal(*rows) if modulated else None,
        "shift": normal(*rows) if modulated else None,
        "weight": normal(channels) if affine else None,
        "bias": normal(channels) if affine else None,
    }


def norm_only(case: dict[str, Any]) -> dict[str, Any]:
    return {name: case[name] for name in ("x", "scale", "shift", "weight", "bias")}


def in_float64(case: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if tensor is None else tensor.double() for name, tensor in case.items()}


def official(case: dict[str, Any], eps: float) -> tuple[Tensor, Tensor]:
    """Compute as a Wan block of diffusers does, in the dtypes of the inputs."""
    x, channels = case["x"], case["x"].shape[-1:]
    gate = 1 if case["gate"] is None else case["gate"]
    total = (x.float() + case["y"] * gate).type_as(x)
    normed = F.layer_norm(total.float(), channels, case["weight"], case["bias"], eps)
    if case["scale"] is not None:
        normed = normed * (1 + case["scale"]) + case["shift"]
    return total, normed.type_as(x)
