"""Measures on the static background of a long clip: colour drift, PSNR against the true clip, and revisits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.metrics.colour import check_frames, delta_e, lab, wasserstein
from postgen.metrics.likeness import PSNR_CAP, psnr, ssim

from .start_end import SHARE, StartEnd, ends, start_end

_AT_ONCE = 128
"""Number of frames that are processed together, so that memory use does not grow with the clip."""


@dataclass(frozen=True, slots=True)
class ColourDrift:
    """Drift of the background colour."""

    delta_e: StartEnd
    """Distance (CIE 1976) of the mean CIELAB background colour from that of the true clip, per frame."""
    lab_F3: Tensor
    """Mean CIELAB background colour per frame, NaN for a frame without background."""
    wasserstein: tuple[float, float, float]
    """Distance between the distributions of L, a and b over the background at the start and at the end."""
    true_wasserstein: tuple[float, float, float]
    """The same distance in the true clip. It is not 0 if a moving camera shows other ground."""


def colour_drift(frames: Tensor, true: Tensor, background: Tensor, share: float = SHARE) -> ColourDrift:
    """Return the drift of the background colour in CIELAB, where 2.3 is about the smallest visible difference.

    Args:
        frames: (F, 3, H, W) in [0, 1].
        true: (F, 3, H, W), the true clip.
        background: bool (F, H, W), pixels of the true clip that show no body.
        share: share of the frames that count as start, and as end.

    Raises:
        UserError: shapes that do not match, a share outside (0, 0.5], or no background at the start or at the end.
    """
    _check(frames, true, background)
    means = [
        torch.cat([_mean_lab(clip[low : low + _AT_ONCE], background[low : low + _AT_ONCE]) for low in _starts(clip)])
        for clip in (frames, true)
    ]
    spread: list[tuple[float, float, float]] = []
    for clip in (frames, true):
        samples = [lab(clip[part]).movedim(1, -1)[background[part]] for part in ends(len(clip), share)]
        if not all(len(sample) for sample in samples):
            raise UserError("colour drift needs background pixels at the start and at the end of the clip: found none")
        light, green_red, blue_yellow = (wasserstein(samples[0][:, c], samples[1][:, c]) for c in range(3))
        spread.append((light, green_red, blue_yellow))
    shift = delta_e(means[0], means[1], dim=1)
    return ColourDrift(start_end(shift, share=share), means[0], spread[0], spread[1])


def _mean_lab(frames: Tensor, mask: Tensor) -> Tensor:
    return (lab(frames).double() * mask[:, None]).sum((2, 3)) / mask.sum((1, 2))[:, None]


@dataclass(frozen=True, slots=True)
class BackgroundPSNR:
    """PSNR of the background against the true clip, in dB (at most 100)."""

    psnr: StartEnd
    """PSNR per frame. `change` is the PSNR of the end minus the PSNR of the start."""
    texel_first: float
    """PSNR of the ground at the start, averaged place by place over all frames of the start; NaN without texels."""
    texel_last: float
    """The same for the end."""
    ceiling_gap: float
    """PSNR of the ceiling's frames at the end minus `psnr.last`; NaN without a ceiling."""


def background_psnr(
    frames: Tensor,
    true: Tensor,
    background: Tensor,
    *,
    texels: Tensor | None = None,
    cell: float = 0.25,
    ceiling: Tensor | None = None,
    share: float = SHARE,
) -> BackgroundPSNR:
    """Return the PSNR over the true background, per frame and averaged on the ground.

    The texel form averages all pixels that show the same place on the ground in a part of the clip. The noise of
    single frames averages out, so the remaining error is a wrong ground.

    Args:
        frames, true, background, share: as in `colour_drift`.
        texels: (F, 2, H, W), position of each pixel on the ground, NaN where there is none.
        cell: edge of a place, in the unit of `texels`.
        ceiling: (F, 3, H, W), the true clip encoded and decoded by the autoencoder: the best that a model can reach.

    Raises:
        UserError: shapes that do not match, or a cell that is not above 0.
    """
    _check(frames, true, background)
    rows = _masked_psnr(frames, true, background)
    found = start_end(rows, share=share)
    gap = first = last = math.nan
    if ceiling is not None:
        _check(ceiling, true, background)
        gap = start_end(_masked_psnr(ceiling, true, background), share=share).last - found.last
    if texels is not None:
        if texels.shape != (len(frames), 2, *frames.shape[-2:]) or not cell > 0:
            raise UserError(f"texels must be (F, 2, H, W) with a cell above 0, got {tuple(texels.shape)}, {cell=}")
        first, last = (
            _texel_psnr(frames[p], true[p], background[p], texels[p], cell) for p in ends(len(frames), share)
        )
    return BackgroundPSNR(found, first, last, gap)


def _masked_psnr(frames: Tensor, true: Tensor, mask: Tensor) -> Tensor:
    parts = [slice(low, low + _AT_ONCE) for low in _starts(frames)]
    return torch.cat([psnr(frames[p], true[p], mask[p]) for p in parts])


def _texel_psnr(frames: Tensor, true: Tensor, background: Tensor, texels: Tensor, cell: float) -> float:
    mask = background & texels.isfinite().all(1)
    if not mask.any():
        return math.nan
    places = (texels.movedim(1, -1)[mask] / cell).floor().long()
    cells, index = places.unique(dim=0, return_inverse=True)
    shift = (frames - true).movedim(1, -1)[mask].double()
    total = shift.new_zeros(len(cells), 3).index_add_(0, index, shift)
    mean = total / torch.bincount(index, minlength=len(cells))[:, None]
    return -10 * math.log10(max(float(mean.square().mean()), 10 ** (-PSNR_CAP / 10)))


@dataclass(frozen=True, slots=True)
class Revisits:
    """Pairs of frames with the same camera pose; NaN where there is no pair."""

    pairs: int
    psnr: float
    """Mean PSNR in dB between the two generated frames."""
    ssim: float
    """Mean SSIM between the two generated frames."""
    gap_db: float
    """Mean in dB of the PSNR of the first visit against the true clip minus that of the second: the loss on return."""


@dataclass(frozen=True, slots=True)
class RevisitConsistency:
    """All revisits, those whose first visit is in the model's context, and those that need memory."""

    all: Revisits
    context: Revisits
    memory: Revisits


def revisit_consistency(
    frames: Tensor,
    true: Tensor,
    background: Tensor,
    poses: Tensor,
    *,
    gap: int = 16,
    window: int = 0,
    most: int = 256,
    tolerance: float = 2e-3,
) -> RevisitConsistency:
    """Return the similarity of frames with the same camera pose, over background that both frames show.

    Args:
        frames, true, background: as in `colour_drift`.
        poses: (F, ...) camera poses; bitwise equal values are the same pose.
        gap: smallest number of frames between the two visits.
        window: number of past frames that the model sees without its memory. A pair within it counts as "context".
        most: largest number of pairs of each kind; they are evenly spaced among all pairs.
        tolerance: largest difference of the true colours of a pixel that counts, because shadows move.

    Raises:
        UserError: shapes that do not match, or a gap or number of pairs below 1.
    """
    _check(frames, true, background)
    if len(poses) != len(frames) or min(gap, most) < 1 or window < 0:
        raise UserError(
            f"{len(poses)} poses for {len(frames)} frames, {gap=}, {most=}, {window=}: give one pose per frame, gap"
            " and most from 1 on, window from 0 on"
        )
    place = poses.reshape(len(poses), -1).unique(dim=0, return_inverse=True)[1]
    number = torch.arange(len(frames), device=place.device)
    first, second = torch.nonzero((place[:, None] == place) & (number - number[:, None] >= gap), as_tuple=True)
    near = second - first <= window
    rows = []
    for kind in (near, ~near):
        index = torch.nonzero(kind)[:, 0]
        if len(index) > most:
            index = index[torch.linspace(0, len(index) - 1, most, device=index.device).round().long()]
        rows.append(_pairs(frames, true, background, first[index], second[index], tolerance))
    return RevisitConsistency(_revisits(torch.cat(rows, 1)), _revisits(rows[0]), _revisits(rows[1]))


def _pairs(
    frames: Tensor, true: Tensor, background: Tensor, first: Tensor, second: Tensor, tolerance: float
) -> Tensor:
    """Return PSNR, SSIM and gap of each pair, (3, N)."""
    columns = [frames.new_zeros(3, 0, dtype=torch.float64)]
    for low in range(0, len(first), _AT_ONCE // 4):
        a, b = first[low : low + _AT_ONCE // 4], second[low : low + _AT_ONCE // 4]
        same = background[a] & background[b] & ((true[a] - true[b]).abs().amax(1) <= tolerance)
        gap = psnr(frames[a], true[a], same) - psnr(frames[b], true[b], same)
        columns.append(torch.stack((psnr(frames[a], frames[b], same), ssim(frames[a], frames[b], same), gap)))
    return torch.cat(columns, 1)


def _revisits(rows: Tensor) -> Revisits:
    return Revisits(int(rows[0].isfinite().sum()), *rows.nanmean(1).tolist())


def _starts(clip: Tensor) -> range:
    return range(0, len(clip), _AT_ONCE)


def _check(frames: Tensor, true: Tensor, background: Tensor) -> None:
    check_frames(frames, 2, "frames")
    check_frames(true, 2, "true frames")
    if frames.shape != true.shape or background.shape != (len(frames), *frames.shape[-2:]):
        raise UserError(
            f"frames have shape {tuple(frames.shape)}, true frames {tuple(true.shape)} and background"
            f" {tuple(background.shape)}: give (F, 3, H, W) for both clips and (F, H, W)"
        )
    if background.dtype != torch.bool:
        raise UserError(f"background must be bool, got {background.dtype}")
