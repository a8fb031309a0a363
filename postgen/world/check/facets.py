"""Round or edged: whether a blob is better explained by an upright cylinder or by an upright box, of many heights.

`shapes` tells the world's solids apart by their proportions too, and a squat cylinder has those of a cube. What it has
not are corners, a straight foot, and sides that are of one shade each.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from postgen.world.check.shapes import bank, misfits, unexplained
from postgen.world.raycast import FAR, Solids, camera_rays, nearest, normals
from postgen.world.spec import HALF_HEIGHT, HALF_WIDTH, SHAPES

#: Height over width.
_BOXES = (0.85, 1.0, 1.2, 1.5, 1.8)
_CYLINDERS = (0.5, 0.65, 0.8, 1.0, 1.25, 1.55, 1.8)
#: How far from above, in radians.
_PITCH = (0.04, 0.12, 0.20, 0.28, 0.37, 0.46, 0.58)
_YAWS = 16
_DISTANCE, _RENDER = 5.0, 96
#: Views that are rendered together.
_PART = 32
#: Weight of the brightness that is not explained, squared, beside the misfit of the outline.
_SHADING = 0.6


@functools.lru_cache(maxsize=8)
def templates(device: str, shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """Views of boxes ("cube") or cylinders as a `shapes.bank`, rendered by the world's own ray caster from 5 m."""
    yaws = (torch.arange(_YAWS) - _YAWS // 2) * (math.pi / 2 / _YAWS) if shape == "cube" else torch.zeros(1)
    heights = torch.tensor(_BOXES if shape == "cube" else _CYLINDERS) * HALF_WIDTH[shape] / HALF_HEIGHT[shape]
    stretch, pitch, yaw = (v.flatten() for v in torch.meshgrid(heights, torch.tensor(_PITCH), yaws, indexing="ij"))
    # Some views at a time: all of them at once would take 1 GB.
    views = zip(stretch.split(_PART), pitch.split(_PART), yaw.split(_PART), strict=True)
    masks, basis, inner = zip(*(_rendered(shape, *part) for part in views), strict=True)
    return torch.cat(masks, 1).to(device), torch.cat(basis).to(device), torch.cat(inner).to(device)


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
    # Space is pressed instead of the body stretched: what is upright or level stays so, and with it the normals.
    ray = ray[0], ray[1], ray[2] / stretch[:, None]
    origin = zero, -_DISTANCE * cos, _DISTANCE * sin / stretch[:, None]
    t, slot = nearest(origin, ray, solids)
    x, y, z = (o + t.clamp_max(1e3) * r for o, r in zip(origin, ray, strict=True))
    normal = torch.stack(normals((x, y, z), slot, solids), 1).reshape(count, 3, _RENDER, _RENDER)
    return bank((t < FAR).float().reshape(count, _RENDER, _RENDER), normal)


def roundness(mask_NP: Tensor, bright_NP: Tensor, blur_N: Tensor) -> Tensor:
    """How much rather a cylinder than a box explains blobs in their `shapes.windows` (N,).

    Difference of the least misfits of outline and shading over their sum, in [-1,1]: below 0 for a box. The fewer
    pixels a body has, the nearer to 0.
    """
    device = str(mask_NP.device)
    box, cylinder = templates(device, "cube"), templates(device, "cylinder")
    best = []
    outlines = misfits(mask_NP, blur_N, box[0], cylinder[0])
    for outline, (_, basis, inner) in zip(outlines, (box, cylinder), strict=True):
        best.append((outline + _SHADING * unexplained(bright_NP, basis, inner).square()).amin(1))
    value: Tensor = (best[0] - best[1]) / (best[0] + best[1]).clamp_min(1e-6)
    return value
