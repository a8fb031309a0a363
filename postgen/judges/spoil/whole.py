"""Corruptions of whole pictures, which need no knowledge of the scene; only `ground_patch` uses the body masks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from .draws import uniform, wide, window
from .takes import Picked


def blur(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Blur the clips with a Gaussian."""
    return blurred(picked.clean, strength)


def blurred(clips_BTCHW: Tensor, deviation: Tensor) -> Tensor:
    """Blur each clip with its own standard deviation (B,) in pixels, at most 3."""
    batch = len(clips_BTCHW)
    steps = torch.arange(-9, 10, device=clips_BTCHW.device).float()
    kernel = torch.exp(-0.5 * (steps / deviation.clamp_min(1e-2)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True))[:, None]
    # Each clip is a group of the convolution; its frames and channels are the batch.
    x = clips_BTCHW.flatten(1, 2).transpose(0, 1)
    x = functional.pad(x, (9,) * 4, mode="replicate")
    x = functional.conv2d(x, kernel[..., None], groups=batch)
    x = functional.conv2d(x, kernel[:, :, None], groups=batch)
    return x.transpose(0, 1).reshape(clips_BTCHW.shape)


def noise(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Add independent noise to every pixel."""
    clips = picked.clean
    return clips + wide(strength) * torch.randn(clips.shape, generator=generator, device=clips.device)


def drift(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Change the brightness of each channel, increasingly over time."""
    clips = picked.clean
    batch, frames = clips.shape[:2]
    way = torch.randn(batch, 1, 3, 1, 1, generator=generator, device=clips.device)
    way = functional.normalize(way - way.mean(2, keepdim=True), dim=2)
    time = torch.linspace(0, 1, frames, device=clips.device)[:, None, None, None]
    return clips * (1 + wide(strength) * way * time)


def flicker(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Change the brightness of every frame randomly."""
    clips = picked.clean
    change = torch.randn(clips.shape[:2], generator=generator, device=clips.device)
    return clips * (1 + wide(strength) * wide(change))


def freeze(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Freeze the clip for some frames; afterwards it continues at its original timing."""
    clips = picked.clean
    batch, frames = clips.shape[:2]
    held = window(clips, strength, generator)[:, :, 0, 0, 0]
    time = torch.arange(frames, device=clips.device).expand(batch, -1)
    first = torch.where(held, time, frames).amin(1, keepdim=True)
    source = torch.where(held, first - 1, time)
    return clips[torch.arange(batch, device=clips.device)[:, None], source]


def ground_patch(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Draw stripes or checks on a part of the ground, around the bodies."""
    clips = picked.clean
    batch, size, device = len(clips), clips.shape[-1], clips.device
    drawn = uniform((8, batch), generator, device)[..., None, None]
    steps = (torch.arange(size, device=device) + 0.5) / size
    y, x = steps[:, None], steps[None, :]
    angle, turns = math.pi * drawn[0], 5 + 12 * drawn[1]
    along = x * angle.cos() + y * angle.sin()
    across = y * angle.cos() - x * angle.sin()
    stripes = torch.sin(2 * math.pi * (turns * along + drawn[2]))
    checks = stripes * torch.sin(2 * math.pi * (turns * across + drawn[3]))
    pattern = torch.where(drawn[4] < 0.5, stripes, 1.5 * checks)
    distance = (x - drawn[5]) ** 2 + (y - 0.45 - 0.5 * drawn[6]) ** 2
    patch = pattern * torch.sigmoid(40 * (0.18 + 0.2 * drawn[7] - distance.sqrt()))
    bare = 1 - picked.matte[:, :, 1:]
    return clips * (1 + wide(strength) * bare * patch[:, None, None])
