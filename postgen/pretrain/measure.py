"""Metrics of reconstructions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def masked_psnr(x: Tensor, y: Tensor, mask: Tensor) -> float:
    """Return the PSNR in dB of values in [-1,1] (peak to peak 2) over the pixels of a mask, pooled over clips.

    Args:
        x, y: (B, 3, T, H, W).
        mask: (B, 1, T, H, W), 1 for pixels that count.
    """
    error = ((x.double() - y.double()).square() * mask).sum() / (mask.sum() * x.shape[1]).clamp_min(1)
    return 10.0 * math.log10(4.0 / max(float(error), 1e-12)) if torch.isfinite(error) else float("nan")
