"""Rendered clips as bytes, and their conversion to the input of the autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.world import Spec
from postgen.world.scenes import render_in_batches


@dataclass(slots=True)
class Clips:
    """Clips of one length: rgb_NT3HW and mask_NTHW (1 on bodies), both uint8, and their scenes."""

    rgb_NT3HW: Tensor
    mask_NTHW: Tensor
    specs: list[Spec]


def render_clips(specs: list[Spec], size: int, device: torch.device | str) -> Clips:
    """Render all scenes (of one length) into one pool of uint8 clips."""
    rgb, masks = [], []
    for picture, ids in render_in_batches(specs, size, device, mask=True):
        rgb.append((picture * 255).round().to(torch.uint8))
        assert ids is not None
        masks.append((ids > 0).to(torch.uint8))
    return Clips(torch.cat(rgb), torch.cat(masks), specs)


def to_model(rgb_BT3HW: Tensor) -> Tensor:
    """Convert uint8, or floats in [0,1], (B,T,3,H,W) to floats (B,3,T,H,W) in [-1,1]."""
    x = rgb_BT3HW.float() / 127.5 - 1.0 if rgb_BT3HW.dtype == torch.uint8 else rgb_BT3HW * 2.0 - 1.0
    return x.transpose(1, 2)


def dilated(mask_BTHW: Tensor, pixels: int = 2) -> Tensor:
    """Dilate a mask by some pixels in each direction of the picture; float32."""
    window = 2 * pixels + 1
    return torch.nn.functional.max_pool2d(mask_BTHW.float(), window, stride=1, padding=pixels)
