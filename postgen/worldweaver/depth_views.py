"""Augment clips with disparity: crop and zoom, mirror, and imitate the look of camera footage.

Suffixes: B clips, F frames. Pictures are uint8 or float in [0,1]; disparity is in 1/m.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_LARGEST_ZOOM = 1.8


class Chance:
    """Draws random numbers on a device, one row per clip."""

    def __init__(self, clips: int, generator: torch.Generator) -> None:
        self.clips, self.generator = clips, generator

    def within(self, low: float, high: float, *more: int) -> Tensor:
        """Return uniform numbers (B, *more)."""
        size = (self.clips, *more)
        return low + (high - low) * torch.rand(size, generator=self.generator, device=self.generator.device)

    def normal(self, spread: float, *more: int) -> Tensor:
        """Return normal numbers (B, *more) with mean 0."""
        size = (self.clips, *more)
        return spread * torch.randn(size, generator=self.generator, device=self.generator.device)


def seen(rgb_BF3HW: Tensor, disparity_BFHW: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crop half of the clips to a square, mirror half of the clips, and resize all to one size.

    An enlarged object looks nearer by the zoom factor, so disparity is multiplied by it (arXiv:2307.10984).

    Returns:
        Pictures (B,F,3,size,size), float in [0,1], and disparity (B,F,size,size), float.
    """
    clips, frames = rgb_BF3HW.shape[:2]
    chance = Chance(clips, generator)
    zoom = torch.where(chance.within(0, 1) < 0.5, chance.within(1, _LARGEST_ZOOM), 1.0)
    mirror = torch.where(chance.within(0, 1) < 0.5, -1.0, 1.0)
    shift = (1 - 1 / zoom)[:, None] * chance.within(-1, 1, 2)
    zero = torch.zeros_like(zoom)
    rows = torch.stack((mirror / zoom, zero, shift[:, 0], zero, 1 / zoom, shift[:, 1]), -1)
    matrix = rows.view(-1, 2, 3).repeat_interleave(frames, 0)

    def grid(pixels: int) -> Tensor:
        return functional.affine_grid(matrix, [len(matrix), 1, pixels, pixels], align_corners=False)

    pictures = rgb_BF3HW.flatten(0, 1).float()
    pictures = pictures / 255 if rgb_BF3HW.dtype == torch.uint8 else pictures
    # Sample each pixel at four positions, because single samples would alias in a smaller picture.
    fine = functional.grid_sample(pictures, grid(2 * size), padding_mode="border", align_corners=False)
    maps = disparity_BFHW.flatten(0, 1)[:, None].float()
    near = functional.grid_sample(maps, grid(size), mode="nearest", padding_mode="border", align_corners=False)
    near = near.unflatten(0, (clips, frames))[:, :, 0] * zoom.view(-1, 1, 1, 1)
    return functional.avg_pool2d(fine, 2).unflatten(0, (clips, frames)), near


def photographed(rgb_BF3HW: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Change colours, contrast and sharpness of a share of the clips and add noise, with one setting for each clip."""
    frames, height, width = rgb_BF3HW.shape[1], *rgb_BF3HW.shape[-2:]
    chance = Chance(len(rgb_BF3HW), generator)

    def each(values: Tensor) -> Tensor:
        return values.view(len(rgb_BF3HW), 1, -1, 1, 1)

    x = rgb_BF3HW.clamp(1e-4, 1) ** each(chance.normal(0.25).exp())
    grey = x.mean(2, keepdim=True)
    x = grey + (x - grey) * each(chance.within(0, 1.5))
    x = x * each(chance.normal(0.12, 3).exp()) * each(chance.normal(0.2).exp())
    middle = x.mean((1, 2, 3, 4), keepdim=True)
    x = middle + (x - middle) * each(chance.within(0.5, 1.3)) + each(chance.normal(0.05))
    flat = x.flatten(0, 1)
    soft = functional.avg_pool2d(functional.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, 1)
    small = functional.interpolate(flat, (height // 2, width // 2), mode="bilinear", antialias=True)
    softer = functional.interpolate(small, (height, width), mode="bilinear")
    kind = each(chance.within(0, 1))
    soft, softer = soft.unflatten(0, (-1, frames)), softer.unflatten(0, (-1, frames))
    x = torch.where(kind < 0.2, soft, torch.where(kind < 0.35, softer, x))
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    x = x + noise * each(chance.within(-0.04, 0.05).clamp_min(0))
    changed = each(chance.within(0, 1)) < share
    return torch.where(changed, x.clamp(0, 1), rgb_BF3HW)
