"""Preprocessing of frames for a network: resize, crop or pad, normalise; in torch, batched, on any device.

The published pipelines work on 8-bit pictures, most of them with PIL. Resizing floats instead changes scores by about
1e-3 and keeps them differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(frames_N3HW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return (frames - mean) / std per channel."""
    shape = (3, 1, 1)
    return (frames_N3HW - frames_N3HW.new_tensor(mean).view(shape)) / frames_N3HW.new_tensor(std).view(shape)


def resize(frames_N3HW: Tensor, height: int, width: int) -> Tensor:
    """Resize (bicubic, antialiased, clamped to [0,1]); frames that already have this size are returned unchanged."""
    if frames_N3HW.shape[-2:] == (height, width):
        return frames_N3HW
    return interpolate(frames_N3HW, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def shorter_side(frames: Tensor, side: int) -> tuple[int, int]:
    """Return the (height, width) whose shorter side is `side`; the longer side is rounded down."""
    height, width = frames.shape[-2:]
    return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)


def centre_crop(frames_N3HW: Tensor, side: int, *, half_even: bool = False) -> Tensor:
    """Crop a centred square. An odd margin is larger below and right, or rounded as in torchvision (`half_even`)."""
    height, width = frames_N3HW.shape[-2:]
    margins = (height - side) / 2, (width - side) / 2
    top, left = (round(m) if half_even else int(m) for m in margins)
    return frames_N3HW[..., top : top + side, left : left + side]


def clip_pixels(frames_N3HW: Tensor, side: int = 224, *, half_even: bool = False) -> Tensor:
    """Preprocess for CLIP: resize the shorter side to `side`, crop the centre, normalise with CLIP's mean and std."""
    sized = resize(frames_N3HW, *shorter_side(frames_N3HW, side))
    return normalise(centre_crop(sized, side, half_even=half_even), CLIP_MEAN, CLIP_STD)


def padded_pixels(frames_N3HW: Tensor, side: int = 224) -> Tensor:
    """Preprocess for HPSv2: longer side to `side` without clamping, black bars, CLIP's mean and std."""
    height, width = frames_N3HW.shape[-2:]
    scale = side / max(height, width)
    if scale != 1:
        size = round(height * scale), round(width * scale)
        frames_N3HW = interpolate(frames_N3HW, size, mode="bicubic", antialias=True)
    # The published code omits the bars if no resizing is needed, and then fails on frames that are not square.
    below, right = (side - length for length in frames_N3HW.shape[-2:])
    frames_N3HW = pad(frames_N3HW, (right // 2, right - right // 2, below // 2, below - below // 2))
    return normalise(frames_N3HW, CLIP_MEAN, CLIP_STD)


def eight_bit(frames: Tensor) -> Tensor:
    """Round to the 256 levels of a video file; values stay in [0,1]."""
    return (frames.clamp(0, 1) * 255).round() / 255


def vbench_resize(frames_N3HW: Tensor, side: int, mode: str) -> Tensor:
    """Resize the shorter side as VBench does: on 8-bit levels, without antialiasing (bilinear or bicubic)."""
    levels = (frames_N3HW.clamp(0, 1) * 255).round()
    size = shorter_side(levels, side)
    if size != levels.shape[-2:]:
        levels = interpolate(levels, size, mode=mode, align_corners=False).clamp(0, 255).round()
    return levels / 255


def luma(frames_N3HW: Tensor) -> Tensor:
    """Return the luma (N,H,W) with the weights of ITU-R BT.709, as scikit-image's `rgb2gray`."""
    return torch.einsum("...chw,c->...hw", frames_N3HW, frames_N3HW.new_tensor((0.2125, 0.7154, 0.0721)))
