"""Clips with the errors that a long rollout gathers: blur, and colours that are too strong or too weak.

Memory is corrupted so in training, before it is encoded, and so the model learns not to trust its colours. Helios
(arXiv:2603.04379) does so with noise, down-sampling and saturation of 0.3 to 1.7; depth is never touched.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

SATURATION = (0.3, 1.7)
"""Least and greatest factor of the distance of colours from grey."""
BLUR = 0.02
"""Greatest standard deviation of the blur, in picture heights."""


def corrupted(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Return clips (B, F, 3, H, W) in [0, 1] blurred and with another saturation, one draw for each clip.

    Args:
        clips: float32 in [0, 1].
        generator: on the CPU.
    """
    draw = torch.rand(len(clips), 2, generator=generator).tolist()
    low, high = SATURATION
    rows = []
    for clip, (wide, strong) in zip(clips, draw, strict=True):
        smooth = blurred(clip, wide * BLUR * clip.shape[-2])
        grey = smooth.mean(1, keepdim=True)
        rows.append((grey + (low + (high - low) * strong) * (smooth - grey)).clamp(0, 1))
    return torch.stack(rows)


def blurred(pictures: Tensor, deviation: float) -> Tensor:
    """Return pictures (F, 3, H, W) with a Gaussian blur of so many pixels; edges are repeated."""
    reach = min(int(3 * deviation + 0.5), min(pictures.shape[-2:]) - 1)
    if reach < 1:
        return pictures
    place = torch.arange(-reach, reach + 1, dtype=torch.float32, device=pictures.device)
    kernel = torch.exp(-0.5 * (place / deviation).square())
    kernel = (kernel / kernel.sum()).to(pictures.dtype)
    planes = pad(pictures.flatten(0, 1)[:, None], (reach, reach, reach, reach), mode="replicate")
    planes = conv2d(conv2d(planes, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return planes[:, 0].view_as(pictures)
