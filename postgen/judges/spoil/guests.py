"""Inserts bodies of other scenes, or second copies of the first body.

An additional intact body is not a fault that a judge can detect without a prompt. Inserted bodies are therefore
transparent, too small, or different from frame to frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .draws import colours, ranks, uniform, wide
from .layers import first_body
from .takes import Picked

_MOST_SPECKS = 7


def ghost(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Insert a transparent body; the strength is its opacity, at most one half."""
    return first_body(picked.guests(generator)).over(picked.clean, wide(strength))


def specks(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Insert `strength` bodies, smaller than any body of the world, at random places."""
    guests = picked.guests(generator)
    body, result = first_body(guests), picked.clean
    batch, frames = result.shape[:2]
    drawn = uniform((_MOST_SPECKS, 4, batch, 1), generator, result.device)
    new = colours((_MOST_SPECKS, batch), generator, result.device)
    for number in range(_MOST_SPECKS):
        x, y, size, grey = drawn[number]
        place = torch.cat((1.7 * x - 0.85, 1.2 * y - 0.3), -1)[:, None].expand(-1, frames, -1)
        scale = (0.035 + 0.035 * size) / body.radius.clamp_min(0.02)
        albedo = torch.where(grey < 0.3, (grey * 3).expand(-1, 3), new[number])
        speck = body.painted(albedo, guests.colour).placed(place, scale)
        result = torch.where(wide(strength) > number, speck.over(result), result)
    return result


def iridescent(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Insert a body in `strength` frames, with another colour in each."""
    guests = picked.guests(generator)
    shown = ranks(picked.clean, generator) < strength[:, None]
    new = colours(picked.clean.shape[:2], generator, picked.clean.device)
    return first_body(guests).painted(new, guests.colour).over(picked.clean, wide(shown.float()))


def double(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Show the first body twice, `strength` radii apart: both half transparent, or one splits off from the other."""
    body, clips = first_body(picked), picked.clean
    batch, frames = clips.shape[:2]
    drawn = uniform((batch, 3), generator, clips.device)
    splits = drawn[:, :1] < 0.5
    time = torch.linspace(0, 1, frames, device=clips.device)
    grows = torch.where(splits, (2 * (time - 0.5 * drawn[:, 1:2])).clamp(0, 1), 1.0)
    shift = 0.5 * strength[:, None] * body.radius * grows
    angle = 0.6 * (drawn[:, 2:] - 0.5)
    step = torch.stack((shift * angle.cos(), shift * angle.sin()), -1)
    one, two = (body.placed(body.centre + way * step, torch.ones_like(shift)) for way in (-1, 1))
    first, second = one.over(picked.empty), two.over(picked.empty)
    # Where two shadows overlap, the ground is no darker than under one shadow.
    ground = torch.minimum(first, second)
    apart = ground + one.cover * (first - ground)
    apart = apart + two.cover * (second - apart)
    return torch.where(wide(splits.float()) > 0, apart, 0.5 * (first + second))
