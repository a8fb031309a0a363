"""The first body as a layer over the scene without it; the layer can be moved, warped, repainted and composited.

A layer over a picture is picture * (1 - opacity * cover) + opacity * paint. `paint` is the light of the body times its
cover, plus the (negative) effect of its shadow around it. The layer of a scene over its own empty scene is therefore
the scene itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .takes import Picked


@dataclass(slots=True)
class Layer:
    """`paint` (B,T,3,H,W), `cover` (B,T,1,H,W) in [0,1]; `centre` (B,T,2) (x, y) and `radius` (B,T) in half widths."""

    paint: Tensor
    cover: Tensor
    centre: Tensor
    radius: Tensor

    def over(self, picture: Tensor, opacity: float | Tensor = 1.0) -> Tensor:
        """Composite the layer over a picture."""
        return picture * (1 - opacity * self.cover) + opacity * self.paint

    def around(self) -> tuple[Tensor, Tensor]:
        """Return the distance in radii and the angle of every pixel from the centre, each (B,T,H,W)."""
        x, y = _steps(self.cover)
        dx, dy = x - self.centre[..., 0, None, None], y - self.centre[..., 1, None, None]
        distance = (dx.square() + dy.square()).sqrt() / self.radius.clamp_min(1e-3)[..., None, None]
        return distance, torch.atan2(dy, dx)

    def warped(self, x: Tensor, y: Tensor, centre: Tensor, radius: Tensor) -> Layer:
        """Sample the layer at (x, y), each (B,T,H or 1,W or 1), in half widths; pixels from outside are empty."""
        both = torch.cat((self.paint, self.cover), 2).flatten(0, 1)
        grid = torch.stack(torch.broadcast_tensors(x, y), -1).flatten(0, 1)
        moved = functional.grid_sample(both, grid, align_corners=False).unflatten(0, self.cover.shape[:2])
        return Layer(moved[:, :, :3], moved[:, :, 3:], centre, radius)

    def placed(self, centre: Tensor, scale: Tensor) -> Layer:
        """Move the layer to another centre (B,T,2) and scale it by a factor (B,T)."""
        x, y = _steps(self.cover)
        s = scale[..., None, None]
        from_x = (x - centre[..., 0, None, None]) / s + self.centre[..., 0, None, None]
        from_y = (y - centre[..., 1, None, None]) / s + self.centre[..., 1, None, None]
        return self.warped(from_x, from_y, centre, self.radius * scale)

    def painted(self, albedo: Tensor, own: Tensor, part: Tensor | float = 1.0) -> Layer:
        """Repaint the layer with another albedo (B,3) or (B,T,3).

        Args:
            albedo: the new albedo.
            own: albedo of the layer, (B,3).
            part: share of the new albedo, broadcast over (B,T,1,H,W).
        """
        old = own[:, None, :, None, None]
        new = albedo.reshape(len(albedo), -1, 3, 1, 1)
        # Light on the body: projection of the paint on its albedo, which weights its strongest channels most.
        light = (self.paint * old).sum(2, keepdim=True) / old.square().sum(2, keepdim=True)
        change = torch.where(self.cover > 0, new * light - self.paint, 0.0)
        return Layer(self.paint + part * change, self.cover, self.centre, self.radius)


def _steps(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (1,W) and y (H,1) of the pixel centres, in half widths from the middle."""
    size = like.shape[-1]
    steps = (torch.arange(size, device=like.device) + 0.5) * (2 / size) - 1
    return steps[None, :], steps[:, None]


def first_body(picked: Picked) -> Layer:
    """Return the layer of the first body. If the body is hidden, its centre is the middle of the picture."""
    cover = picked.matte[:, :, :1]
    paint = picked.clean - (1 - cover) * picked.empty
    x, y = _steps(cover)
    weight = cover[:, :, 0]
    area = weight.sum((-1, -2))
    centre = (
        torch.stack(((weight * x).sum((-1, -2)), (weight * y).sum((-1, -2))), -1) / area.clamp_min(1e-3)[..., None]
    )
    radius = (area / torch.pi).sqrt() * (2 / cover.shape[-1])
    return Layer(paint, cover, centre, radius)
