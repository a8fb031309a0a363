"""Similarity of two pictures over the pixels of a mask: PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .colour import luma

PSNR_CAP = 100.0
"""Largest PSNR in dB that `psnr` returns; equal pictures have this value."""


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the PSNR in dB of each pair of pictures, (F,), at most `PSNR_CAP`; NaN for a frame whose mask is empty.

    Args:
        a, b: pictures (F, C, H, W) in [0, 1].
        mask: bool (F, H, W), True for the pixels that count. None: all pixels.
    """
    error = (a - b).double().square().mean(1)
    error = error.mean((1, 2)) if mask is None else (error * mask).sum((1, 2)) / mask.sum((1, 2))
    return -10 * error.clamp_min(10 ** (-PSNR_CAP / 10)).log10()


def ssim(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the structural similarity of each pair of pictures, (F,): Gaussian windows on luma (Wang et al. 2004).

    A window is 11 pixels wide, or the largest odd width that the picture allows. A window counts when the mask holds
    all of its pixels. The result is NaN for a frame without such a window.

    Args:
        a, b: pictures (F, 3, H, W) in [0, 1].
        mask: bool (F, H, W), True for the pixels that count. None: all pixels.
    """
    size = min(11, *a.shape[-2:])
    size -= 1 - size % 2
    taps = torch.arange(size, dtype=a.dtype, device=a.device) - size // 2
    taps = torch.exp(-(taps**2) / (2 * 1.5**2))
    taps = (taps / taps.sum()).reshape(1, 1, 1, -1)
    x, y = luma(a)[:, None], luma(b)[:, None]
    maps = torch.cat((x, y, x * x, y * y, x * y))
    maps = functional.conv2d(functional.conv2d(maps, taps), taps.mT)
    mean_x, mean_y, xx, yy, xy = maps.double()[:, 0].chunk(5)
    low, high = 0.01**2, 0.03**2
    cover = (2 * mean_x * mean_y + low) * (2 * (xy - mean_x * mean_y) + high)
    cover = cover / ((mean_x**2 + mean_y**2 + low) * (xx - mean_x**2 + yy - mean_y**2 + high))
    if mask is None:
        return cover.mean((1, 2))
    whole = -functional.max_pool2d(-mask[:, None].double(), size, stride=1)[:, 0]
    return (cover * whole).sum((1, 2)) / whole.sum((1, 2))
