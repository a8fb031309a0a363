"""Outlines painted over a clip, flat or with the shading of a ball and a shadow on the ground."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.world_kinds.stage import RGB

#: An outline: a function that returns whether points are inside (x right, y down, in radii from the centre).
Outline = Callable[[Tensor, Tensor], Tensor]
_SUPER = 4


def circle(x: Tensor, y: Tensor) -> Tensor:
    """Return whether points are inside the unit disc."""
    return x * x + y * y < 1


def ellipse(wide: float, high: float, angle: float = 0.0) -> Outline:
    """Return an ellipse with the half axes `wide` and `high`, rotated by `angle` in radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return lambda x, y: ((cos * x + sin * y) / wide) ** 2 + ((cos * y - sin * x) / high) ** 2 < 1


def egg(long: float, taper: float) -> Outline:
    """Return an egg that stands on its blunt end."""
    return lambda x, y: (x / (1 + taper * y / long)) ** 2 + (y / long) ** 2 < 1


def polygon(corners: int, phase: float = 0.0) -> Outline:
    """Return a regular polygon with the area of the unit disc."""
    step = 2 * math.pi / corners
    reach = math.sqrt(2 * math.pi / (corners * math.sin(step)))

    def inside(x: Tensor, y: Tensor) -> Tensor:
        angle = torch.remainder(torch.atan2(y, x) + phase, step) - step / 2
        return torch.hypot(x, y) * angle.cos() < reach * math.cos(step / 2)

    return inside


def star(points: int, inner: float, phase: float = 0.0) -> Outline:
    """Return a star. `inner` is the radius of its notches divided by that of its points."""
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
    """Return a disc with a hole of radius `hole`."""
    return lambda x, y: (x * x + y * y < 1) & (x * x + y * y > hole * hole)


def half_disc(angle: float) -> Outline:
    """Return half of a disc."""
    return lambda x, y: (x * x + y * y < 1.4) & (x * math.cos(angle) + y * math.sin(angle) > -0.1)


def cross(arm: float) -> Outline:
    """Return a plus sign."""
    return lambda x, y: torch.minimum(x.abs(), y.abs()).lt(arm) & torch.maximum(x.abs(), y.abs()).lt(1.1)


def triangle_up(x: Tensor, y: Tensor) -> Tensor:
    """Return whether points are inside a triangle on its base, the outline of a cone or a pyramid."""
    return (y < 0.9) & (y > -1.2) & (x.abs() < 0.55 * (y + 1.2))


def cover(outline: Outline, size: int, x: float, y: float, radius: float) -> Tensor:
    """Return the share (H,W) of each pixel inside the outline; centre and radius are in picture widths."""
    steps = (torch.arange(size * _SUPER) + 0.5) / (size * _SUPER)
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    inside = outline((u - x) / radius, (v - y) / radius).float()
    return torch.nn.functional.avg_pool2d(inside[None], _SUPER)[0]


def shade(size: int, x: float, y: float, radius: float, side: float = -0.5) -> Tensor:
    """Return the brightness (H,W) of a ball with light from above. With `side` < 0 it also comes from the left."""
    steps = (torch.arange(size) + 0.5) / size
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    dx, dy = (u - x) / radius, (v - y) / radius
    dz = (1 - dx * dx - dy * dy).clamp_min(0).sqrt()
    return 0.42 + 0.62 * ((side * dx - 0.6 * dy + 0.62 * dz) / 1.0).clamp(0, 1)


def paint(picture: Tensor, outline: Outline, x: float, y: float, radius: float, rgb: RGB, flat: bool) -> Tensor:
    """Paint one body over a picture (3,H,W) and, unless it is flat, its shadow."""
    size = picture.shape[-1]
    if not flat:
        foot = cover(ellipse(1.1, 0.3), size, x + 0.35 * radius, y + 0.85 * radius, radius)
        picture = picture * (1 - 0.55 * foot)
    part = cover(outline, size, x, y, radius)
    light = torch.full((size, size), 0.95) if flat else shade(size, x, y, radius)
    return picture * (1 - part) + part * light * torch.tensor(rgb)[:, None, None]
