"""Corruptions of the consistency of the first body from frame to frame."""

from __future__ import annotations

import torch
from torch import Tensor

from .draws import colours, ranks, rhythm, uniform, wide, window
from .layers import first_body
from .takes import Picked


def vanishing(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Remove the body for some frames in the middle of the clip."""
    return torch.where(window(picked.clean, strength, generator), picked.empty, picked.clean)


def strobe(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Make the body transparent in every second or third frame, or in random ones; invisible there at level 4."""
    beat = rhythm(picked.clean, generator).float()
    return first_body(picked).over(picked.empty, 1 - wide(strength) * wide(beat))


def size_jitter(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Enlarge or shrink the body randomly in each frame."""
    body = first_body(picked)
    drawn = uniform((2, *picked.clean.shape[:2]), generator, picked.clean.device)
    way = torch.where(drawn[0] < 0.5, -1.0, 1.0) * (0.5 + 0.5 * drawn[1])
    return body.placed(body.centre, (strength[:, None] * way).exp()).over(picked.empty)


def shape_jitter(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Show another shape in some frames, or in the last ones."""
    shown = ranks(picked.clean, generator) < strength[:, None]
    return torch.where(wide(shown), picked.other, picked.clean)


def recolouring(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Blend in another colour: from some frame on, in a rhythm, or a new colour in every frame."""
    clips = picked.clean
    batch, frames = clips.shape[:2]
    drawn = uniform((batch, 2), generator, clips.device)
    beat = rhythm(clips, generator)
    many = colours((batch, frames), generator, clips.device)
    # One colour for all frames: of the drawn colours, the one that differs most from the body's own.
    far = (many - picked.colour[:, None]).abs().sum(-1).argmax(1)
    one = many[torch.arange(batch, device=clips.device), far][:, None].expand_as(many)
    start = (frames * (0.3 + 0.6 * drawn[:, 1:])).floor()
    later = torch.arange(frames, device=clips.device) >= start
    each = drawn[:, :1] >= 0.7
    when = torch.where(drawn[:, :1] < 0.4, later, beat | each)
    new = torch.where(each[..., None], many, one)
    part = wide(strength) * wide(when.float())
    return first_body(picked).painted(new, picked.colour, part).over(picked.empty)
