"""Pinhole camera model: convert picture cells to points of the world, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import check_number


@dataclass(frozen=True, kw_only=True, slots=True)
class Pinhole:
    """Intrinsics of a camera. Pixel centres have whole-number coordinates; the upper left pixel is (0, 0)."""

    focal: float = 2.77
    """Focal length in units of half the picture height; the default is that of `postgen.world`."""
    aspect: float = 1.0
    """Width of the picture divided by its height."""

    def __post_init__(self) -> None:
        check_number("focal", self.focal, 1e-6)
        check_number("aspect", self.aspect, 1e-6)

    def points(self, pose: Tensor, depth: Tensor) -> Tensor:
        """Return the world points (..., 3, h * w) at the centres of h x w cells.

        Args:
            pose: (..., 3, 4) float64 camera.
            depth: (..., h, w) depth of each cell along the optical axis.
        """
        height, width = depth.shape[-2:]
        down = (torch.arange(height, device=pose.device, dtype=pose.dtype) * 2 + 1) / height - 1
        right = ((torch.arange(width, device=pose.device, dtype=pose.dtype) * 2 + 1) / width - 1) * self.aspect
        v, u = torch.meshgrid(down / self.focal, right / self.focal, indexing="ij")
        rays = torch.stack([u, v, torch.ones_like(u)]).flatten(1)
        rotation, position = pose.split((3, 1), -1)
        points: Tensor = _turned(rotation.mT, rays * depth.flatten(-2)[..., None, :]) + position
        return points

    def project(self, pose: Tensor, points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (row, column, depth) of world points (..., 3, P), in cells. Points behind the camera get depth -1."""
        rotation, position = pose.split((3, 1), -1)
        x, y, z = _turned(rotation, points - position).unbind(-2)
        safe = torch.where(z > 1e-6, z, 1)
        column = ((x * self.focal / safe / self.aspect + 1) * width - 1) / 2
        row = ((y * self.focal / safe + 1) * height - 1) / 2
        return row, column, torch.where(z > 1e-6, z, -1)


def _turned(rotation: Tensor, points: Tensor) -> Tensor:
    """Multiply rotations (..., 3, 3) by points (..., 3, P)."""
    # No matrix product: its rounding would depend on the other items of the batch.
    x, y, z = points.unbind(-2)
    lines = [line.unbind(-1) for line in rotation.unbind(-2)]
    return torch.stack([a[..., None] * x + b[..., None] * y + c[..., None] * z for a, b, c in lines], -2)
