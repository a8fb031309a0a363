"""Corrupt clips with errors that accumulate in a long rollout: blur and wrong colour saturation.

In training, memory clips are corrupted before they are encoded, so that the model learns not to rely on the colours of
its memory. Helios (arXiv:2603.04379) uses noise, down-sampling and saturation factors of 0.3 to 1.7. Depth is never
corrupted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

SATURATION = (0.3, 1.7)
"""Smallest and largest saturation factor (the factor on the distance of a colour from grey)."""
BLUR = 0.02
"""Largest standard deviation of the blur, in picture heights."""


def corrupted(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Return clips (B, F, 3, H, W) with blur and another saturation, drawn once for each clip.

    Args:
        clips: float32 in [0, 1].
        generator: CPU generator.
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
    """Apply a Gaussian blur to pictures (F, 3, H, W). `deviation` is in pixels; edge pixels are repeated."""
    reach = min(int(3 * deviation + 0.5), min(pictures.shape[-2:]) - 1)
    if reach < 1:
        return pictures
    place = torch.arange(-reach, reach + 1, dtype=torch.float32, device=pictures.device)
    kernel = torch.exp(-0.5 * (place / deviation).square())
    kernel = (kernel / kernel.sum()).to(pictures.dtype)
    planes = pad(pictures.flatten(0, 1)[:, None], (reach, reach, reach, reach), mode="replicate")
    planes = conv2d(conv2d(planes, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return planes[:, 0].view_as(pictures)
