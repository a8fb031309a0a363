"""Bit planes: w ~ c_0 + sum_i c_i B_i with B_i in {0, 1}, and coefficients by least squares (arXiv:2602.04163)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from postgen.kernels.fp8 import SMALLEST_SCALE

RIDGE = 1e-4
"""Number on the diagonal of the normal equations. A plane without ones gets the coefficient 0 by it."""


def design(values: Tensor, planes: int) -> Tensor:
    """Return the columns 1, B_1, ..., B_k of patterns (..., G) as (..., G, k + 1), float32."""
    every = torch.arange(1 << planes, device=values.device)[:, None]
    bits = (every >> torch.arange(planes, device=values.device)) & 1
    rows = torch.cat([torch.ones_like(every), bits], 1).float()
    return nn.functional.embedding(values.long(), rows)


def fitted(columns: Tensor, target: Tensor, ridge: float | Tensor = RIDGE) -> Tensor:
    """Return the coefficients of least squares, (..., G, k + 1) and (..., G) -> (..., k + 1), float32."""
    exact, right = columns.double(), target.double()[..., None]
    normal = exact.mT @ exact
    normal.diagonal(dim1=-2, dim2=-1).add_(ridge)
    found: Tensor = torch.linalg.solve(normal, exact.mT @ right)
    return found[..., 0].float()


def first_patterns(x: Tensor, planes: int) -> Tensor:
    """Return the k most significant bits of each group's 8-bit numbers; the range of a group contains 0."""
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    step: Tensor = ((high - low) / 255).clamp_min(SMALLEST_SCALE)
    codes: Tensor = ((x / step).round() + (-low / step).round()).clamp(0, 255)
    return (codes / (1 << (8 - planes))).floor()


def first_coefficients(x: Tensor, planes: int) -> Tensor:
    """Return coefficients that fit the first patterns of a grouped tensor, (..., G) -> (..., k + 1)."""
    return fitted(design(first_patterns(x, planes), planes), x)


def stored(coefficients: Tensor) -> Tensor:
    """Round coefficients to bfloat16, in which they are stored; float32."""
    return coefficients.bfloat16().float()
