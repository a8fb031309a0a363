"""Corruptions of the appearance of the first body that are visible in a single frame."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .draws import colours, uniform, wide
from .layers import Layer, first_body
from .takes import Picked
from .whole import blurred


def outline(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Add two to six waves to the outline, or a hole in the middle of the body."""
    body, device = first_body(picked), picked.clean.device
    batch = len(picked.rows)
    drawn = uniform((3, batch), generator, device)[..., None, None, None]
    distance, angle = body.around()
    waves = 2 + (5 * drawn[0]).floor()
    amount = strength.reshape(-1, 1, 1, 1)
    bulge = 1 + amount * torch.cos(waves * angle + 2 * math.pi * drawn[1])
    reach = distance / bulge * body.radius[..., None, None]
    x = body.centre[..., 0, None, None] + reach * angle.cos()
    y = body.centre[..., 1, None, None] + reach * angle.sin()
    wavy = body.warped(x, y, body.centre, body.radius).over(picked.empty)
    solid = torch.sigmoid(12 * (distance - 1.8 * amount))[:, :, None]
    ring = Layer(body.paint * solid, body.cover * solid, body.centre, body.radius).over(picked.empty)
    return torch.where(wide(drawn[2].flatten()) < 0.25, ring, wavy)


def melted(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Soften the edges of the body only."""
    body = first_body(picked)
    soft = blurred(torch.cat((body.paint, body.cover), 2), strength)
    return Layer(soft[:, :, :3], soft[:, :, 3:], body.centre, body.radius).over(picked.empty)


def flat(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Remove the shading of the body: one even colour."""
    body = first_body(picked)
    inside = (body.cover > 0.99).float()
    mean = (body.paint * inside).sum((-1, -2), keepdim=True) / inside.sum((-1, -2), keepdim=True).clamp_min(1)
    change = torch.where(body.cover > 0, body.cover * mean - body.paint, 0.0)
    paint = body.paint + wide(strength) * change
    return Layer(paint, body.cover, body.centre, body.radius).over(picked.empty)


def stain(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Blend another colour into the body from one side."""
    body, device = first_body(picked), picked.clean.device
    drawn = uniform((2, len(picked.rows)), generator, device)[..., None, None, None]
    colour = _another(picked, generator)
    distance, angle = body.around()
    along = distance * torch.cos(angle - 2 * math.pi * drawn[0])
    side = torch.sigmoid(5 * (along - 0.6 * drawn[1] + 0.3))[:, :, None]
    return body.painted(colour, picked.colour, wide(strength) * side).over(picked.empty)


def dull(picked: Picked, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Paint the body with a colour outside the world's palette: grey, black, white, or a dark or pale version."""
    device = picked.clean.device
    drawn = uniform((2, len(picked.rows)), generator, device)[..., None]
    grey = (0.05 + 0.9 * drawn[1]).expand(-1, 3)
    dark = 0.35 * picked.colour
    pale = 0.35 * picked.colour + 0.6
    chosen = torch.where(drawn[0] < 0.5, grey, torch.where(drawn[0] < 0.75, dark, pale))
    return first_body(picked).painted(chosen, picked.colour, wide(strength)).over(picked.empty)


def _another(picked: Picked, generator: torch.Generator) -> Tensor:
    """Choose for each scene a colour of the world that differs from that of its first body: (B,3)."""
    tried = colours((4, len(picked.rows)), generator, picked.clean.device)
    far = (tried - picked.colour).abs().sum(-1)
    return tried[far.argmax(0), torch.arange(tried.shape[1], device=tried.device)]
