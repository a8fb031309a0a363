"""Round or edged: whether an upright cylinder or an upright box explains a blob better, over many heights.

`shapes` also separates the world's solids by their proportions, and a squat cylinder has the proportions of a cube.
But it has no corners, no straight foot and no sides of one shade each. These features are small compared with the
misfit of an outline that is slightly displaced, too large or too soft. Therefore the misfit does not count these three
deviations.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

from postgen.world.check.shapes import BLURS, GRID, WINDOW, blurred, by_blur, framed, orthonormal, unexplained
from postgen.world.raycast import FAR, Solids, camera_rays, nearest, normals
from postgen.world.spec import HALF_HEIGHT, HALF_WIDTH, SHAPES

#: Ratios of height to width; the first box is the world's cube.
_BOXES = (1.0, 0.85, 1.2, 1.5, 1.8)
_CYLINDERS = (0.5, 0.65, 0.8, 1.0, 1.25, 1.55, 1.8)
#: Angles of the view from above, in radians.
_PITCH = (0.04, 0.12, 0.20, 0.28, 0.37, 0.46, 0.58)
_YAWS = 16
_DISTANCE, _RENDER = 5.0, 96
#: Number of views that are rendered together.
_PART = 32
#: Weight of the squared unexplained brightness, relative to the misfit of the outline.
_SHADING = 0.3


@functools.lru_cache(maxsize=8)
def templates(device: str, shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of boxes ("cube") or cylinders, rendered by the world's ray caster from 5 m.

    The views cover all combinations of heights, pitches and yaws.

    Args:
        device: device of the result.
        shape: "cube" or "cylinder".

    Returns:
        Bases of the outlines (blurs,P,T,5) and of the shading (blurs,T,P,4), with orthonormal columns, and inner
            pixels (T,P); T views, P pixels per window.
    """
    yaws = (torch.arange(_YAWS) - _YAWS // 2) * (math.pi / 2 / _YAWS) if shape == "cube" else torch.zeros(1)
    heights = torch.tensor(_BOXES if shape == "cube" else _CYLINDERS) * HALF_WIDTH[shape] / HALF_HEIGHT[shape]
    stretch, pitch, yaw = (v.flatten() for v in torch.meshgrid(heights, torch.tensor(_PITCH), yaws, indexing="ij"))
    # The views are rendered in parts, as all of them at once would take 1 GB.
    views = zip(stretch.split(_PART), pitch.split(_PART), yaw.split(_PART), strict=True)
    outline, shade, inner = zip(*(_rendered(shape, *part) for part in views), strict=True)
    return torch.cat(outline, 2).to(device), torch.cat(shade, 1).to(device), torch.cat(inner).to(device)


def _rendered(shape: str, stretch: Tensor, pitch: Tensor, yaw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count, kind = len(pitch), SHAPES.index(shape)
    cos, sin = pitch.cos()[:, None], pitch.sin()[:, None]
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    rotation = torch.cat((one, zero, zero, zero, -sin, -cos, zero, cos, -sin), 1).reshape(count, 3, 3)
    every, none = torch.arange(count), torch.arange(0)
    solids = Solids(
        torch.zeros(count, 1, 3),
        torch.full((count, 1), 0.8),
        yaw[:, None],
        torch.full((count, 1), kind),
        [(every, torch.zeros_like(every)) if k == kind else (none, none) for k in range(len(SHAPES))],
    )
    ray = camera_rays(rotation, _RENDER, 1)
    # Space is compressed instead of stretching the body: vertical and horizontal faces keep their normals.
    ray = ray[0], ray[1], ray[2] / stretch[:, None]
    origin = zero, -_DISTANCE * cos, _DISTANCE * sin / stretch[:, None]
    t, slot = nearest(origin, ray, solids)
    x, y, z = (o + t.clamp_max(1e3) * r for o, r in zip(origin, ray, strict=True))
    normal = torch.stack(normals((x, y, z), slot, solids), 1).reshape(count, 3, _RENDER, _RENDER)
    window, inner = framed((t < FAR).float().reshape(count, _RENDER, _RENDER), normal)
    softened = [blurred(window, blur / (2 * WINDOW) * GRID) for blur in BLURS]
    outline = torch.stack(
        [_outline(soft[:, 0], window[:, :1], blur) for soft, blur in zip(softened, BLURS, strict=True)]
    )
    shade = [orthonormal(soft[:, 1:] / soft[:, :1].clamp_min(0.3), inner) for soft in softened]
    return outline, torch.stack(shade), inner


def _outline(soft_TGG: Tensor, sharp_T1GG: Tensor, blur: float) -> Tensor:
    """Return a basis (P,T,5) of an outline and of its changes when it is moved, enlarged or softened."""
    around = functional.pad(soft_TGG, (1, 1, 1, 1))
    dx, dy = around[:, 1:-1, 2:] - around[:, 1:-1, :-2], around[:, 2:, 1:-1] - around[:, :-2, 1:-1]
    v, u = torch.meshgrid(*((torch.arange(GRID) + 0.5) / GRID * 2 - 1 for _ in range(2)), indexing="ij")
    softer = blurred(sharp_T1GG, 1.35 * blur / (2 * WINDOW) * GRID + 0.1)[:, 0] - soft_TGG
    change = torch.stack((soft_TGG, dx, dy, u * dx + v * dy, softer), -1).flatten(1, 2)
    basis: Tensor = torch.linalg.qr(functional.normalize(change, dim=1))[0].movedim(1, 0)
    return basis


def roundness(mask_NP: Tensor, bright_NP: Tensor, blur_N: Tensor) -> Tensor:
    """Return how much better a cylinder of any height explains blobs than a cube, and than a box of any height (N,2).

    A value is the difference of the least misfits (outline and shading), divided by their sum, in [-1,1]. It is below
    0 for a cube, or for a box of any height. Values of bodies with few pixels are closer to 0.

    Args:
        mask_NP, bright_NP, blur_N: windows of the blobs, from `shapes.windows`.
    """
    device = str(mask_NP.device)
    box, cylinder = (
        _least(mask_NP, bright_NP, blur_N, device, "cube"),
        _least(mask_NP, bright_NP, blur_N, device, "cylinder"),
    )
    edged = torch.stack((box[:, 0], box.amin(1)), 1)
    rounded = cylinder.amin(1, keepdim=True)
    value: Tensor = (edged - rounded) / (edged + rounded).clamp_min(1e-6)
    return value


def _least(mask_NP: Tensor, bright_NP: Tensor, blur_N: Tensor, device: str, shape: str) -> Tensor:
    """Return the least misfit of blobs with the views of each height (N,heights)."""
    outline, shade, inner = templates(device, shape)
    heights = len(_BOXES if shape == "cube" else _CYLINDERS)
    least = mask_NP.new_empty(len(mask_NP), heights)
    for blur, rows in by_blur(blur_N):
        mask = mask_NP[rows]
        held = (mask @ outline[blur].flatten(1)).square().unflatten(1, outline.shape[2:]).sum(-1)
        left = 1 - held / mask.square().sum(1, keepdim=True).clamp_min(1e-6)
        misfit = left.clamp_min(0) + _SHADING * unexplained(bright_NP[rows], shade[blur], inner).square()
        least[rows] = misfit.unflatten(1, (heights, -1)).amin(2)
    return least
