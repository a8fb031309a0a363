"""Measures of a clip over time: flicker, error after exact warping, motion.

The measures need no network and no reference clip. Each measure is one number per clip. Flicker and warp error are
lowest for a frozen clip, so read them together with `motion`.

Shapes: B clips, F frames. Values are in [0, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from postgen.errors import UserError

LEAST_CHANGE = 1e-4
"""Smaller values of `frame_change` count as this in logarithms, because a frozen clip has 0: 1/40 of an 8-bit step."""


def flicker(clips: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the part of the change between frames that reverses at once, (B,): mean |x[t-1] - 2 x[t] + x[t+1]| / 2.

    A steady drift or fade contributes nothing. A value that alternates by an amount a contributes a.

    Args:
        clips: (B, F, 3, H, W), F >= 3.
        mask: bool (B, F, H, W), True for the pixels that count; a pixel is used when it counts in all three frames.
            None: all pixels.

    Raises:
        UserError: fewer than 3 frames, or another shape.
    """
    _check(clips, 3)
    change = (clips[:, :-2] - 2 * clips[:, 1:-1] + clips[:, 2:]).abs().mean(dim=2) / 2
    return _mean(change, None if mask is None else mask[:, :-2] & mask[:, 1:-1] & mask[:, 2:])


def warp_error(clips: Tensor, flow: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean absolute difference between each frame and the next frame warped back along the flow, (B,).

    Args:
        clips: (B, F, 3, H, W), F >= 2.
        flow: (B, F-1, 2, H, W), displacement in pixels (right, down) from a frame to the next, as
            `postgen.world.render` returns it.
        mask: bool (B, F-1, H, W), True for pixels whose flow is correct and whose target is visible. None: all pixels.
            A target outside the picture never counts.

    Raises:
        UserError: shapes that do not match.
    """
    _check(clips, 2)
    batch, frames, _, height, width = clips.shape
    if flow.shape != (batch, frames - 1, 2, height, width):
        raise UserError(f"flow must be {(batch, frames - 1, 2, height, width)}, got {tuple(flow.shape)}")
    y, x = (torch.arange(n, device=clips.device, dtype=clips.dtype) for n in (height, width))
    target = torch.stack([x[None, :] + flow[:, :, 0], y[:, None] + flow[:, :, 1]], dim=-1)
    size = clips.new_tensor([width, height])
    inside = ((target >= 0) & (target <= size - 1)).all(dim=-1)
    # Pixel i of n has its centre at (i + 1/2) / n of the picture.
    grid = ((2 * target + 1) / size - 1).flatten(0, 1)
    carried = functional.grid_sample(clips[:, 1:].flatten(0, 1), grid, padding_mode="border", align_corners=False)
    error = (carried.unflatten(0, (batch, frames - 1)) - clips[:, :-1]).abs().mean(dim=2)
    return _mean(error, inside if mask is None else inside & mask)


def motion(clips: Tensor, *, gap: int = 4, block: int = 8, reach: int = 12) -> Tensor:
    """Return the mean distance in pixels that blocks move per frame, (B,). A block that stands still counts as 0.

    Each block is searched in the picture `gap` frames later by its mean squared difference, so the resolution is
    1/gap. A shift of n pixels must lower the difference by more than n / 10000 compared with no shift: flat ground and
    its noise do not count as motion.

    Args:
        clips: (B, F, 3, H, W), F > gap.
        gap: number of frames between a picture and the picture that it is compared with.
        block: side of a block in pixels.
        reach: largest shift in pixels that is searched along each axis.

    Raises:
        UserError: too few frames, a parameter below 1, or a picture smaller than a block.
    """
    _check(clips, gap + 1)
    if min(gap, block, reach) < 1 or min(clips.shape[-2:]) < block:
        raise UserError(
            f"{gap=}, {block=}, {reach=} with pictures of {tuple(clips.shape[-2:])} pixels: each must be at least 1,"
            " and a picture must be at least one block high and wide"
        )
    now, later = clips[:, :-gap].flatten(0, 1), clips[:, gap:].flatten(0, 1)
    height, width = now.shape[-2:]
    later = functional.pad(later, (reach,) * 4, mode="replicate")
    best = now.new_full((len(now), height // block, width // block), torch.inf)
    length = torch.zeros_like(best)
    error = torch.empty_like(now)  # shared by all shifts: an allocation takes longer than a subtraction
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            top, left, far = reach + down, reach + right, math.hypot(down, right)
            torch.sub(later[..., top : top + height, left : left + width], now, out=error).square_()
            cost = functional.avg_pool2d(error, block).mean(dim=1) + 1e-4 * far
            length = torch.where(cost < best, length.new_tensor(far), length)
            best = torch.minimum(best, cost)
    lengths: Tensor = length.unflatten(0, (len(clips), -1))
    return lengths.mean(dim=(1, 2, 3)) / gap


def frame_change(clip: Tensor) -> float:
    """Return the mean absolute difference of neighbouring frames of a clip (F, 3, H, W).

    It is 0 for a single frame or a frozen clip. Reward trainers call it the motion of a clip: it needs no search, but
    it also grows with contrast, noise and flicker.
    """
    return (clip[1:] - clip[:-1]).abs().mean().item() if len(clip) > 1 else 0.0


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over (F, H, W); NaN for a clip without a pixel that counts."""
    if mask is None:
        return values.mean(dim=(1, 2, 3))
    return (values * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))


def _check(clips: Tensor, least: int) -> None:
    if clips.dim() != 5 or clips.shape[2] != 3 or clips.shape[1] < least:
        raise UserError(f"clips must be (B, F, 3, H, W) with at least {least} frames, got {tuple(clips.shape)}")
