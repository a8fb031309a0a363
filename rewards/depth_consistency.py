"""Check that the depth maps of a clip match it: they must move with the pixels and share the edges of the picture.

This reward is for models that generate a depth video beside the picture. It estimates nothing but the motion, by block
matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from postgen.rewards.base import unfit

_CHANGE = (0.06, 0.2)
"""Change of log depth of a pixel along its motion: good up to the first value, bad from the second."""
_FLICKER = (0.02, 0.08)
"""The same for the change of the median over the map, from one pair of frames to the next."""
_STEP = 0.06
"""Difference of inverse depth between neighbours that counts as an outline, relative to its 0.95 quantile."""
_STRONG = 0.9
"""Quantile of a frame's colour gradients above which they count as edges."""
_FOUND = (0.25, 0.95)
"""Share of outline pixels that lie on edges, beyond chance: bad up to the first value, good from the second."""
_SIDE, _REACH, _BLOCK = 96, 6, 7
"""Block matching uses blocks of 7 px and a search range of 6 px, in a picture of at most 96 px."""


def depth_consistency(
    completions: Sequence[Tensor],
    *,
    depth: Sequence[Tensor],
    flow: Sequence[Tensor | None] | None = None,
    log_reasons: Any = None,
) -> list[float | None]:
    """Score depth maps against their clips: the minimum of `carried` and `outlined`.

    Args:
        completions: clips (F,3,H,W) in [0,1].
        depth: column of (F,H,W): distances in any unit that is the same for all frames; infinite for the sky; NaN or
            not positive where the depth is unknown.
        flow: column of (F-1,2,H,W) in px, u right and v down, from a frame to the next; None uses block matching.
        log_reasons: receives the reasons of missing scores.

    Returns:
        One score in [0,1] per clip; None for a single frame.

    Raises:
        ValueError: depth or flow does not have the size of the clip.
    """
    if log_reasons is not None:
        log_reasons([unfit(clip, 2) for clip in completions])
    motions: Sequence[Any] = flow if flow is not None else [None] * len(completions)
    return [_score(*row) for row in zip(completions, depth, motions, strict=True)]


def _score(clip: Tensor, depth: Tensor, flow: Tensor | None) -> float | None:
    frames, _, height, width = clip.shape
    maps = torch.as_tensor(depth).to(clip.device, torch.float32)
    if maps.shape != (frames, height, width):
        raise ValueError(f"depth must be {(frames, height, width)} like its clip, got {tuple(maps.shape)}")
    if frames < 2:
        return None
    motion = block_motion(clip) if flow is None else torch.as_tensor(flow).to(clip.device, torch.float32)
    if motion.shape != (frames - 1, 2, height, width):
        raise ValueError(f"flow must be {(frames - 1, 2, height, width)}, got {tuple(motion.shape)}")
    return min(carried(maps, motion), outlined(clip, maps))


def _ramp(value: Tensor, fine_bad: tuple[float, float]) -> Tensor:
    """1 up to the first bound, 0 from the second bound on, linear between them."""
    fine, bad = fine_bad
    return ((bad - value) / (bad - fine)).clamp(0, 1)


def carried(depth_FHW: Tensor, flow_F2HW: Tensor) -> float:
    """Return how well pixels keep their depth when they move to the next frame, in [0,1].

    The result is the minimum of two terms. The first is the mean over the pixels, computed for static and moving
    pixels separately; the worse one counts. The second is the mean over the frames of how evenly the median depth
    changes. Outlines, and pixels that leave the picture, are excluded.
    """
    known = depth_FHW.isfinite() & (depth_FHW > 0)
    log = torch.where(known, depth_FHW, 1.0).log()
    calm = known & ~_widened(_outlines(depth_FHW))
    # Sample the next frame's depth at the end point of each pixel's motion.
    height, width = log.shape[1:]
    ys, xs = (torch.arange(n, device=log.device) for n in (height, width))
    to_x, to_y = xs + flow_F2HW[:, 0], ys[:, None] + flow_F2HW[:, 1]
    grid = torch.stack(((to_x + 0.5) / width * 2 - 1, (to_y + 0.5) / height * 2 - 1), -1)
    after, after_calm = functional.grid_sample(
        torch.stack((log[1:], calm[1:].float()), 1), grid, align_corners=False
    ).unbind(1)
    use = calm[:-1] & (after_calm > 0.99) & (grid.abs() < 1).all(-1)
    change = torch.where(use, after - log[:-1], torch.nan)
    kept = _ramp(change.abs().nan_to_num(0), _CHANGE)
    # Score moving and static pixels separately, so that a large static background cannot hide errors.
    moving = flow_F2HW.norm(dim=1) > 0.5
    groups = [part for part in (use & moving, use & ~moving) if part.any()]
    if not groups:
        return 0.0
    median = change.flatten(1).nanmedian(1).values.nan_to_num(0)
    even = _ramp(median.diff().abs(), _FLICKER).mean() if len(median) > 1 else log.new_ones(())
    return min(float(even), *(float(kept[part].mean()) for part in groups))


def outlined(clip: Tensor, depth_FHW: Tensor) -> float:
    """Return how many depth outlines lie within a pixel of picture edges, as a score in [0,1].

    The score is 1 if 95 % do beyond chance, and 0 if 25 % do. Maps without any outline get 0, because nothing relates
    them to the picture.
    """
    outline = _outlines(depth_FHW)
    colour = functional.avg_pool2d(clip.float(), 3, 1, 1)
    dx = functional.pad(colour[..., 1:] - colour[..., :-1], (0, 1)).abs().amax(1)
    dy = functional.pad(colour[..., 1:, :] - colour[..., :-1, :], (0, 0, 0, 1)).abs().amax(1)
    slope = torch.maximum(dx, dy)
    bound = _quantile(slope, _STRONG)
    edge = _widened((slope >= bound) & (slope > 0.02))
    if not outline.any():
        return 0.0
    found, chance = float(edge[outline].float().mean()), float(edge.float().mean())
    bad, fine = _FOUND
    share = (found - chance) / max(1 - chance, 1e-6)
    return min(1.0, max(0.0, (share - bad) / (fine - bad)))


def _outlines(depth_FHW: Tensor) -> Tensor:
    """Mark pixels with a depth step to the right or below. Inverse depth is linear on a plane, so planes have none."""
    inverse = torch.where(depth_FHW > 0, 1 / depth_FHW, torch.nan)
    bound = _STEP * _quantile(inverse, 0.95)
    right = (inverse[..., 1:] - inverse[..., :-1]).abs() > bound
    below = (inverse[:, 1:] - inverse[:, :-1]).abs() > bound
    return functional.pad(right, (0, 1)) | functional.pad(below, (0, 0, 0, 1))


def _quantile(maps_FHW: Tensor, part: float) -> Tensor:
    """Return a quantile of each frame (F,1,1), ignoring NaN; frame by frame, because torch limits the input size."""
    return torch.stack([frame.flatten().nanquantile(part) for frame in maps_FHW])[:, None, None]


def _widened(mask_FHW: Tensor) -> Tensor:
    return functional.max_pool2d(mask_FHW[:, None].float(), 3, 1, 1)[:, 0] > 0


def block_motion(clip: Tensor) -> Tensor:
    """Estimate the motion (F-1,2,H,W) in px by matching blocks of 7 px in a picture reduced to at most 96 px.

    The search covers up to 6 px of the reduced picture per frame, in whole px. Where blocks do not differ, the
    smallest motion is chosen.
    """
    height, width = clip.shape[-2:]
    scale = min(1.0, _SIDE / max(height, width))
    small = functional.interpolate(clip.float(), scale_factor=scale, mode="area") if scale < 1 else clip.float()
    padded = functional.pad(small[1:], (_REACH,) * 4, mode="replicate")
    high, wide = small.shape[-2:]
    best = torch.full((len(clip) - 1, high, wide), torch.inf, device=clip.device)
    motion = torch.zeros(len(clip) - 1, 2, high, wide, device=clip.device)
    for v in range(-_REACH, _REACH + 1):
        for u in range(-_REACH, _REACH + 1):
            moved = padded[..., _REACH + v : _REACH + v + high, _REACH + u : _REACH + u + wide]
            gap = functional.avg_pool2d((moved - small[:-1]).abs().mean(1, keepdim=True), _BLOCK, 1, _BLOCK // 2)[:, 0]
            gap = gap + 1e-3 * (u * u + v * v) ** 0.5
            better = gap < best
            best = torch.where(better, gap, best)
            motion = torch.where(better[:, None], motion.new_tensor([u, v])[:, None, None], motion)
    return functional.interpolate(motion / (wide / width), (height, width), mode="nearest")
