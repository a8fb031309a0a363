"""Flat paint: outlines drawn over a clip, with or without the shading of a ball, and a shadow on the ground."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.world_kinds.stage import RGB

#: An outline: whether points (x right, y down, in radii from the centre) lie inside.
Outline = Callable[[Tensor, Tensor], Tensor]
_SUPER = 4


def circle(x: Tensor, y: Tensor) -> Tensor:
    """A disc."""
    return x * x + y * y < 1


def ellipse(wide: float, high: float, angle: float = 0.0) -> Outline:
    """An ellipse with these half axes."""
    cos, sin = math.cos(angle), math.sin(angle)
    return lambda x, y: ((cos * x + sin * y) / wide) ** 2 + ((cos * y - sin * x) / high) ** 2 < 1


def egg(long: float, taper: float) -> Outline:
    """An egg that stands on its blunt end."""
    return lambda x, y: (x / (1 + taper * y / long)) ** 2 + (y / long) ** 2 < 1


def polygon(corners: int, phase: float = 0.0) -> Outline:
    """A regular polygon of the same area as the disc."""
    step = 2 * math.pi / corners
    reach = math.sqrt(2 * math.pi / (corners * math.sin(step)))

    def inside(x: Tensor, y: Tensor) -> Tensor:
        angle = torch.remainder(torch.atan2(y, x) + phase, step) - step / 2
        return torch.hypot(x, y) * angle.cos() < reach * math.cos(step / 2)

    return inside


def star(points: int, inner: float, phase: float = 0.0) -> Outline:
    """A star; `inner` is the radius of its notches over that of its points."""
    step = 2 * math.pi / points
    far, near = 1.25, 1.25 * inner

    def inside(x: Tensor, y: Tensor) -> Tensor:
        angle = (torch.remainder(torch.atan2(y, x) + phase, step) - step / 2).abs()
        ax, ay = far, 0.0
        bx, by = near * math.cos(step / 2), near * math.sin(step / 2)
        radius = torch.hypot(x, y)
        px, py = radius * angle.cos(), radius * angle.sin()
        return (bx - ax) * (py - ay) - (by - ay) * (px - ax) > 0

    return inside


def ring(hole: float) -> Outline:
    """A disc with a hole."""
    return lambda x, y: (x * x + y * y < 1) & (x * x + y * y > hole * hole)


def half_disc(angle: float) -> Outline:
    """Half of a disc."""
    return lambda x, y: (x * x + y * y < 1.4) & (x * math.cos(angle) + y * math.sin(angle) > -0.1)


def cross(arm: float) -> Outline:
    """A plus."""
    return lambda x, y: torch.minimum(x.abs(), y.abs()).lt(arm) & torch.maximum(x.abs(), y.abs()).lt(1.1)


def triangle_up(x: Tensor, y: Tensor) -> Tensor:
    """A triangle that stands on its base, as a cone or a pyramid looks."""
    return (y < 0.9) & (y > -1.2) & (x.abs() < 0.55 * (y + 1.2))


def cover(outline: Outline, size: int, x: float, y: float, radius: float) -> Tensor:
    """Part of each pixel (H,W) that lies inside; centre and radius in picture widths."""
    steps = (torch.arange(size * _SUPER) + 0.5) / (size * _SUPER)
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    inside = outline((u - x) / radius, (v - y) / radius).float()
    return torch.nn.functional.avg_pool2d(inside[None], _SUPER)[0]


def shade(size: int, x: float, y: float, radius: float, side: float = -0.5) -> Tensor:
    """Brightness (H,W) of a ball that is lit from above, `side` < 0: from the left."""
    steps = (torch.arange(size) + 0.5) / size
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    dx, dy = (u - x) / radius, (v - y) / radius
    dz = (1 - dx * dx - dy * dy).clamp_min(0).sqrt()
    return 0.42 + 0.62 * ((side * dx - 0.6 * dy + 0.62 * dz) / 1.0).clamp(0, 1)


def paint(picture: Tensor, outline: Outline, x: float, y: float, radius: float, rgb: RGB, flat: bool) -> Tensor:
    """Draw one body over a picture (3,H,W) and, if it is not flat, its shadow."""
    size = picture.shape[-1]
    if not flat:
        foot = cover(ellipse(1.1, 0.3), size, x + 0.35 * radius, y + 0.85 * radius, radius)
        picture = picture * (1 - 0.55 * foot)
    part = cover(outline, size, x, y, radius)
    light = torch.full((size, size), 0.95) if flat else shade(size, x, y, radius)
    return picture * (1 - part) + part * light * torch.tensor(rgb)[:, None, None]
