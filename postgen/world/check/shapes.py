"""The shape of a blob: its outline and its shading, compared with those of the world's solids seen from all sides.

Outlines are scaled to unit area around their centroid. Shading: light is white and Lambertian, so within the lit part
the brightness is linear in the surface normal. A template explains the shading of a blob if a linear function of the
template's normals does (least squares, 4 unknowns).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from postgen.world.check.outlines import outlines
from postgen.world.check.segment import Blobs
from postgen.world.raycast import FAR, Solids, camera_rays, nearest, normals
from postgen.world.spec import SHAPES

GRID = 24
#: Half the side of the normalised window in square roots of the blob's area.
WINDOW = 0.95
_PITCH = (0.10, 0.20, 0.30, 0.40, 0.50, 0.60)
_YAWS = 9
#: Blur of the templates, relative to the root of the area; a blob of sqrt(area) = s px has a blur of about 1.1 / s.
BLURS = (0.03, 0.05, 0.075, 0.11)
_RENDER = 160
#: Number of views that are rendered together.
_PART = 16


def _angles() -> list[tuple[int, float, float]]:
    cubes = [(1, pitch, (k - _YAWS // 2) * (math.pi / 2) / _YAWS) for pitch in _PITCH for k in range(_YAWS)]
    return [(0, 0.3, 0.0)] + cubes + [(2, pitch, 0.0) for pitch in _PITCH]


@functools.lru_cache(maxsize=4)
def templates(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the templates: views of the solids, rendered from 5 m by the world's ray caster.

    The views cover several pitches and yaws.

    Args:
        device: device of the result.

    Returns:
        Outlines (blurs,T,P), shading bases (T,P,4) with orthonormal columns, inner pixels (T,P), shapes (T,); T views,
            P = GRID^2.
    """
    turns = _angles()
    # The views are rendered in parts to save memory.
    parts = [_rendered(turns[low : low + _PART]) for low in range(0, len(turns), _PART)]
    masks, basis, inner = zip(*parts, strict=True)
    shape = torch.tensor([turn[0] for turn in turns])
    return torch.cat(masks, 1).to(device), torch.cat(basis).to(device), torch.cat(inner).to(device), shape.to(device)


def _rendered(views: list[tuple[int, float, float]]) -> tuple[Tensor, Tensor, Tensor]:
    count = len(views)
    rotation, position = torch.zeros(count, 3, 3), torch.zeros(count, 3)
    for row, (_, pitch, _yaw) in enumerate(views):
        cos, sin = math.cos(pitch), math.sin(pitch)
        rotation[row] = torch.tensor([[1.0, 0.0, 0.0], [0.0, -sin, -cos], [0.0, cos, -sin]])
        position[row] = torch.tensor([0.0, -5.0 * cos, 5.0 * sin])
    shape = torch.tensor([v[0] for v in views])
    members = [
        ((shape == s).nonzero()[:, 0], torch.zeros(int((shape == s).sum()), dtype=torch.long)) for s in range(3)
    ]
    yaw = torch.tensor([[v[2]] for v in views])
    solids = Solids(torch.zeros(count, 1, 3), torch.full((count, 1), 0.8), yaw, shape[:, None], members)
    ray = camera_rays(rotation, _RENDER, 1)
    origin = (position[:, :1], position[:, 1:2], position[:, 2:3])
    t, slot = nearest(origin, ray, solids)
    point = tuple(o + t.clamp_max(1e3) * r for o, r in zip(origin, ray, strict=True))
    normal = torch.stack(normals((point[0], point[1], point[2]), slot, solids), 1).reshape(count, 3, _RENDER, _RENDER)
    hit = (t < FAR).float().reshape(count, _RENDER, _RENDER)
    window, inner = framed(hit, normal)
    masks = torch.stack([blurred(window[:, :1], blur / (2 * WINDOW) * GRID)[:, 0] for blur in BLURS])
    return masks.flatten(2), orthonormal(window[:, 1:], inner), inner


def framed(hit_TRR: Tensor, normal_T3RR: Tensor) -> tuple[Tensor, Tensor]:
    """Return outline and normals (T,4,GRID,GRID) of rendered views in windows as in `crop`, and inner pixels (T,P)."""
    area = hit_TRR.sum((1, 2))
    steps = torch.arange(hit_TRR.shape[-1]).float()
    x, y = (hit_TRR * steps).sum((1, 2)) / area, (hit_TRR * steps[:, None]).sum((1, 2)) / area
    window = crop(torch.cat((hit_TRR[:, None], normal_T3RR * hit_TRR[:, None]), 1), x, y, area)
    return window, (-functional.max_pool2d(-window[:, :1], 3, 1, 1) > 0.99).flatten(1).float()


def orthonormal(normal_T3GG: Tensor, inner_TP: Tensor) -> Tensor:
    """Return a basis (T,P,4), with orthonormal columns, of all linear functions of the normal within the outline."""
    basis = torch.cat((torch.ones_like(normal_T3GG[:, :1]), normal_T3GG), 1).flatten(2) * inner_TP[:, None]
    left, value, _ = torch.linalg.svd(basis.mT, full_matrices=False)
    result: Tensor = left * (value > 1e-3 * value[:, :1])[:, None]
    return result


@functools.lru_cache(maxsize=4)
def strangers(device: str) -> tuple[Tensor, Tensor]:
    """Return foreign outlines (blurs,T,P) that no solid has, and the shapes that each one rules out (3,T)."""
    window, belongs = outlines(GRID, WINDOW)
    masks = torch.stack([blurred(window[:, None], blur / (2 * WINDOW) * GRID)[:, 0] for blur in BLURS])
    return masks.flatten(2).to(device), belongs.to(device)


def crop(maps_NCHW: Tensor, x: Tensor, y: Tensor, area: Tensor, grid: int = GRID) -> Tensor:
    """Cut windows (N,C,grid,grid) out of maps, centred at (x, y) px; their side is 2 * WINDOW * sqrt(area)."""
    height, width = maps_NCHW.shape[-2:]
    steps = ((torch.arange(grid, device=x.device) + 0.5) / grid * 2 - 1) * WINDOW
    reach = area.clamp_min(1).sqrt()[:, None] * steps
    gx = ((x[:, None] + reach + 0.5) / width * 2 - 1)[:, None, :].expand(-1, grid, -1)
    gy = ((y[:, None] + reach + 0.5) / height * 2 - 1)[:, :, None].expand(-1, -1, grid)
    return functional.grid_sample(maps_NCHW, torch.stack((gx, gy), -1), align_corners=False)


def blurred(maps_NCHW: Tensor, sigma: float) -> Tensor:
    """Apply a Gaussian blur to each channel; sigma is in cells, up to 2."""
    steps = torch.arange(-6, 7, device=maps_NCHW.device).float()
    kernel = torch.exp(-0.5 * (steps / max(sigma, 0.2)) ** 2)
    kernel = (kernel / kernel.sum()).reshape(1, 1, -1)
    x = functional.conv2d(maps_NCHW.flatten(0, 1)[:, None], kernel[..., None], padding=(6, 0))
    return functional.conv2d(x, kernel[:, :, None], padding=(0, 6)).reshape(maps_NCHW.shape)


def views(blobs: Blobs, picture_N: Tensor, slot_N: Tensor, *grids: int) -> list[Tensor]:
    """Return soft outline and brightness of blobs (N,2,grid,grid) in windows as in `crop`, one tensor per grid.

    Args:
        blobs: the blobs.
        picture_N, slot_N: picture and slot of each blob.
        grids: sides of the windows in cells.
    """
    area, x, y = (v[picture_N, slot_N] for v in (blobs.area, blobs.x, blobs.y))
    height, width = blobs.hue_MHW.shape[1:]
    own = (blobs.slot_MP[picture_N].reshape(-1, height, width) == slot_N[:, None, None]).float()
    same = (blobs.hue_MHW[picture_N] == blobs.kind[picture_N, slot_N][:, None, None]).float()
    near = functional.max_pool2d(own[:, None], 5, 1, 2)[:, 0]
    soft = blobs.soft_M2HW[picture_N]
    maps = torch.stack((soft[:, 0] * torch.maximum(own, same * near), soft[:, 1]), 1)
    return [crop(maps, x, y, area, grid) for grid in grids]


def windows(view_N2GG: Tensor, area_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split `views` of GRID cells into outline and brightness (N,P), and choose the blur of each blob.

    The third result (N,) is an index of `BLURS`, chosen by the area in pixels.
    """
    window = view_N2GG.flatten(2)
    level = (1.1 / area_N.clamp_min(1).sqrt())[:, None] - window.new_tensor(BLURS)
    return window[:, 0], window[:, 1], level.abs().argmin(1)


def shape_features(mask_NP: Tensor, bright_NP: Tensor, blur_N: Tensor) -> Tensor:
    """Return the features (N, 3, 3) of blobs in their `windows`; the last axis is the shape.

    The features are the misfit of the outline and the misfit of the shading with the best view of the shape, both 0
    for a perfect match; and the advantage of the best foreign outline (`outlines`), at most 0 if no foreign outline
    fits better.
    """
    masks, basis, inner, shape = templates(str(mask_NP.device))
    strange, belongs = strangers(str(mask_NP.device))
    outline, apart = misfits(mask_NP, blur_N, masks, strange)
    shading = unexplained(bright_NP, basis, inner)
    result = []
    for s in range(len(SHAPES)):
        view = torch.where(shape == s, outline, torch.inf).argmin(1, keepdim=True)
        fit = outline.gather(1, view)
        better = fit - torch.where(belongs[s], apart, torch.inf).amin(1, keepdim=True)
        result.append(torch.cat((fit, shading.gather(1, view), better), 1))
    return torch.stack(result, -1)


def misfits(mask_NP: Tensor, blur_N: Tensor, *banks: Tensor) -> list[Tensor]:
    """Return squared differences between outlines and each bank (blurs,T,P), relative to the mean area: (N,T) each."""
    found = [mask_NP.new_empty(len(mask_NP), masks.shape[1]) for masks in banks]
    for blur, rows in by_blur(blur_N):
        for distance, masks in zip(found, banks, strict=True):
            distance[rows] = _distance(mask_NP[rows], masks[blur])
    return found


def by_blur(blur_N: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of each of `BLURS`, and the rows that use it."""
    # This waits for the device once; a search for the rows of each blur would wait once per blur.
    counts = (blur_N[:, None] == torch.arange(len(BLURS), device=blur_N.device)).sum(0).tolist()
    return enumerate(blur_N.argsort(stable=True).split(counts))


def _distance(mask_NP: Tensor, template_TP: Tensor) -> Tensor:
    """Return the squared difference of soft outlines relative to their mean area (N,T)."""
    one, two = (mask_NP**2).sum(1)[:, None], (template_TP**2).sum(1)
    return (one + two - 2 * mask_NP @ template_TP.T).clamp_min(0) / (0.5 * (one + two))


def unexplained(bright_NP: Tensor, basis_TP4: Tensor, inner_TP: Tensor) -> Tensor:
    """Return the root mean square brightness that the template's normals do not explain, relative to the mean (N,T).

    Only pixels inside the outline count.
    """
    power = (bright_NP**2) @ inner_TP.T
    held = torch.einsum("np,tpk->ntk", bright_NP, basis_TP4).square().sum(-1)
    count = inner_TP.sum(1)
    mean = (bright_NP @ inner_TP.T) / count
    return ((power - held).clamp_min(0) / count).sqrt() / mean.clamp_min(1e-3)
