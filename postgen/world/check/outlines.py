"""Outlines that a ball, a cube or a cylinder never has; the judge rejects a body that matches one of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_SUPER = 6
Inside = Callable[[Tensor, Tensor], Tensor]


def outlines(grid: int, window: float) -> tuple[Tensor, Tensor]:
    """Return soft outlines of foreign shapes (T,grid,grid), and the solids that each one rules out (3,T), bool.

    Each outline has unit area and is centred at its centroid.

    Args:
        grid: side of the window in cells.
        window: half the side of the window in roots of the area, as in `shapes.crop`.
    """
    ball = [_polygon(n, k * 2 * math.pi / n / 4) for n in (3, 4, 5, 6) for k in range(4)]
    ball += [_ellipse(aspect, k * math.pi / 6) for aspect in (1.35, 1.7) for k in range(6)]
    ball += [_egg(way) for way in (0.25, -0.25)]
    half = [_half_disc(k * math.pi / 4) for k in range(8)]
    stars = [_star(n, inner, k * math.pi / n / 2) for n, inner in ((4, 0.5), (5, 0.5), (6, 0.6)) for k in range(4)]
    wedge = [_triangle(wide) for wide in (0.45, 0.6)]
    upright = [_ellipse(aspect, math.pi / 2 + tilt) for aspect in (1.5, 1.75, 2.0, 2.3) for tilt in (-0.12, 0.0, 0.12)]
    groups = ((ball, (0,)), (half, (0, 1)), (stars, (0, 1, 2)), (wedge, (0, 1, 2)), (upright, (0, 2)))
    shapes = [inside for group, _ in groups for inside in group]
    counts = torch.tensor([[s in of for s in range(3)] for group, of in groups for _ in group]).T
    return torch.stack([_drawn(inside, grid, window) for inside in shapes]), counts


def _drawn(inside: Inside, grid: int, window: float) -> Tensor:
    """Return the share of each cell of the window that lies inside the outline."""
    steps = ((torch.arange(400) + 0.5) / 400 * 2 - 1) * 2.5
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    mask = inside(u, v).float()
    total = mask.sum()
    x, y = (mask * u).sum() / total, (mask * v).sum() / total
    root = (total * (5 / 400) ** 2).sqrt()
    fine = ((torch.arange(grid * _SUPER) + 0.5) / (grid * _SUPER) * 2 - 1) * window * root
    v, u = torch.meshgrid(fine, fine, indexing="ij")
    return functional.avg_pool2d(inside(u + x, v + y).float()[None], _SUPER)[0]


def _polygon(corners: int, phase: float) -> Inside:
    step = 2 * math.pi / corners

    def inside(x: Tensor, y: Tensor) -> Tensor:
        angle = torch.remainder(torch.atan2(y, x) + phase, step) - step / 2
        return torch.hypot(x, y) * angle.cos() < math.cos(step / 2)

    return inside


def _star(points: int, inner: float, phase: float) -> Inside:
    step = 2 * math.pi / points
    bx, by = inner * math.cos(step / 2), inner * math.sin(step / 2)

    def inside(x: Tensor, y: Tensor) -> Tensor:
        angle = (torch.remainder(torch.atan2(y, x) + phase, step) - step / 2).abs()
        px, py = torch.hypot(x, y) * angle.cos(), torch.hypot(x, y) * angle.sin()
        return (bx - 1) * py - by * (px - 1) > 0

    return inside


def _ellipse(aspect: float, angle: float) -> Inside:
    cos, sin = math.cos(angle), math.sin(angle)
    return lambda x, y: ((cos * x + sin * y) / aspect) ** 2 + (cos * y - sin * x) ** 2 < 1


def _egg(taper: float) -> Inside:
    return lambda x, y: (x / (1 + taper * y / 1.35)) ** 2 + (y / 1.35) ** 2 < 1


def _half_disc(angle: float) -> Inside:
    return lambda x, y: (x * x + y * y < 1) & (x * math.cos(angle) + y * math.sin(angle) > -0.1)


def _triangle(wide: float) -> Inside:
    return lambda x, y: (y < 0.9) & (y > -1.2) & (x.abs() < wide * (y + 1.2))
