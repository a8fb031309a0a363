"""Random draws of the corruptions. The number of draws never depends on a strength, so levels differ in that only."""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.world.spec import COLOURS


def uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Return uniform random numbers in [0,1)."""
    return torch.rand(shape, generator=generator, device=device)


def wide(value: Tensor) -> Tensor:
    """Reshape (B,) or (B,T) to (B,1 or T,1,1,1) for broadcasting over clips."""
    return value.reshape(len(value), -1, 1, 1, 1)


def window(clips: Tensor, length: Tensor, generator: torch.Generator) -> Tensor:
    """Mask an interval of `length` frames after the first frame and, if possible, before the last: (B,T,1,1,1)."""
    batch, frames = clips.shape[:2]
    part = torch.rand(batch, generator=generator, device=clips.device)
    start = 1 + (part * (frames - 1 - length).clamp_min(1)).floor()
    time = torch.arange(frames, device=clips.device)
    return wide((time >= start[:, None]) & (time < (start + length)[:, None]))


def ranks(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Rank all frames, (B,T): frames of rank below n are n random frames or, in half of the clips, the last n.

    The frames of a lower level are therefore a subset of those of a higher level.
    """
    batch, frames = clips.shape[:2]
    drawn = uniform((batch, frames + 1), generator, clips.device)
    scattered = drawn[:, 1:].argsort(1).argsort(1)
    last = torch.arange(frames - 1, -1, -1, device=clips.device).expand(batch, -1)
    return torch.where(drawn[:, :1] < 0.5, scattered, last)


def rhythm(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Select frames (B,T), bool: every second, every third, or a random set that contains the middle frame."""
    batch, frames = clips.shape[:2]
    drawn = uniform((batch, frames + 2), generator, clips.device)
    time = torch.arange(frames, device=clips.device)
    step = torch.where(drawn[:, :1] < 0.4, 2, 3)
    beat = time % step == 1
    some = (drawn[:, 2:] < 0.25) | (time == frames // 2)
    return torch.where(drawn[:, :1] < 0.75, beat, some)


def colours(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw random albedos from the world's colours: (*shape,3)."""
    palette = torch.tensor(list(COLOURS.values()), device=device)
    return palette[torch.randint(len(palette), shape, generator=generator, device=device)]
