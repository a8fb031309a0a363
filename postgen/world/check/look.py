"""The observations in clips: for several clips at once, or for a long clip window by window, with the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from postgen.errors import UserError
from postgen.world.check import edges, events
from postgen.world.check.facets import roundness
from postgen.world.check.film import Film, filmed
from postgen.world.check.ground import balance, balance_along, find_spots
from postgen.world.check.pieces import COLUMNS
from postgen.world.check.segment import Blobs, find_blobs, smooth
from postgen.world.check.shapes import GRID, shape_features, views, windows
from postgen.world.check.sight import Sight
from postgen.world.check.tracks import BODY_AREA
from postgen.world.spec import SHAPES

Windows = Callable[[], Iterator[Tensor]]
"""Function that returns a clip from its start, as consecutive windows (f,3,H,W)."""

_SHADING = 0.1
#: Longest side of pictures that are not reduced, longest side after a reduction, and smallest side.
_LARGE, _REDUCED, _LEAST = 1024, 512, 32
_SLACK = 0.5


def check_form(shape: Sequence[int]) -> None:
    """Check the shape of clips (B,F,3,H,W).

    Raises:
        UserError: another shape, too few frames, or pictures that are too small.
    """
    if len(shape) != 5 or shape[2] != 3 or shape[1] < 5 or min(shape[-2:]) < _LEAST:
        raise UserError(f"check needs clips (B,F,3,H,W) with F >= 5 and at least 32 px, not {tuple(shape)}.")


def check_values(frames: Tensor) -> None:
    """Check that frames are floats in [0,1]; the overshoot of a decoder is allowed.

    Raises:
        UserError: integers, or values in another range such as [-1,1], in which the judge would recognise nothing.
    """
    if not frames.is_floating_point():
        raise UserError(f"check needs frames as floats in [0,1], got {frames.dtype}: divide bytes by 255.")
    if frames.numel():
        low, high = (float(end) for end in frames.aminmax())
        if low < -_SLACK or high > 1 + _SLACK:
            raise UserError(f"check needs frames in [0,1], got values from {low:.3g} to {high:.3g}: rescale them.")


def look(clips: Tensor, cameras: Sequence[str] = ()) -> Sight:
    """Return the observations in clips (B,F,3,H,W).

    These are the blobs and spots, the similarity of each clip to the world, and its camera motion along the requested
    path.
    """
    frames, pictures = clips.shape[1], _clean(clips.flatten(0, 1))
    rows, count, spots, measures, body = _seen(pictures, balance(pictures, frames))
    static = all(camera == "static" for camera in cameras)
    return Sight(
        rows_NC=rows,
        count_BF=count.reshape(-1, frames),
        spots_MSC=spots,
        height=pictures.shape[-2],
        width=pictures.shape[-1],
        likeness=_world_likeness(measures.unflatten(0, (-1, frames))),
        film=[None] * len(clips) if static else filmed(pictures, body, cameras),
    )


def look_along(clip: Windows, camera: str = "static") -> Sight:
    """Return the observations of one clip as `look` does, from windows.

    Memory stays small: only the blobs, the spots and a few measures of each window are kept.
    """
    frames, size = 0, torch.Size((0, 0))

    def counted() -> Iterator[Tensor]:
        nonlocal frames, size
        frames, form = 0, None
        for window in clip():
            form = form or window.shape[1:]
            if window.ndim != 4 or window.shape[1:] != form or form[0] != 3 or min(form[1:]) < _LEAST:
                raise UserError(
                    f"check needs windows (f,3,H,W) of one size, at least {_LEAST} px, not {tuple(window.shape)}."
                )
            if not len(window):
                continue
            check_values(window)
            pictures = _clean(window)
            frames, size = frames + len(window), pictures.shape[-2:]
            yield pictures

    # First passes: the colour of the ground over the whole clip, and the number of frames.
    gain = balance_along(counted)
    check_form((1, frames, 3, *size))
    film = None if camera == "static" else Film(camera, frames)
    # Last pass: the observations.
    parts, before = [], frames
    for pictures in counted():
        own = None if gain is None else gain.to(pictures.device).expand(len(pictures), 3, 1, 1)
        rows, count, spots, measures, body = _seen(pictures, own)
        parts.append((rows, count, spots, measures))
        if film is not None:
            film.add(pictures, body)
    if frames != before:
        raise UserError(f"check needs the same clip at each call, got {before} frames at first, then {frames}.")
    return Sight(
        rows_NC=np.concatenate([part[0] for part in parts]),
        count_BF=np.concatenate([part[1] for part in parts])[None],
        spots_MSC=np.concatenate([part[2] for part in parts]),
        height=size[0],
        width=size[1],
        likeness=_world_likeness(torch.cat([part[3] for part in parts])[None]),
        film=[None if film is None else film.way()],
    )


def _clean(frames_F3HW: Tensor) -> Tensor:
    """Smooth values, clamp them to [0,1], and reduce very large pictures by averaging square blocks of pixels."""
    clean = frames_F3HW.detach().float().nan_to_num(0.5).clamp(0, 1)
    short, long = sorted(clean.shape[-2:])
    if long > _LARGE and (side := min(-(-long // _REDUCED), short // _LEAST)) > 1:
        clean = functional.avg_pool2d(clean, side)
    return smooth(clean)


def _seen(
    pictures: Tensor, gain: Tensor | None
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64], Tensor, Tensor]:
    """Return the rows of all blobs, their number per picture, the spots, the `_measures` and the body pixels."""
    blobs = find_blobs(pictures, gain)
    body = (blobs.slot_MP >= 0).reshape(-1, *pictures.shape[-2:])
    spots = find_spots(pictures if gain is None else pictures * gain, body).double().cpu().numpy()
    columns = torch.stack([getattr(blobs, name).double() for name in ("valid", *COLUMNS[:-4])], -1)
    table = torch.cat((columns, blobs.box.double(), _misfits(blobs).double()), -1).cpu().numpy()
    valid = table[..., 0] > 0
    return table[valid][:, 1:], valid.sum(1), spots, _measures(pictures, blobs), body


def _measures(pictures_M3HW: Tensor, blobs: Blobs) -> Tensor:
    """Return measures (M,4) of the surroundings of the bodies in each picture.

    The columns are the share of the picture, the roughness, the share of stray colour, and the brightness.
    """
    height, width = pictures_M3HW.shape[-2:]
    body = (blobs.slot_MP >= 0).float().reshape(-1, height, width)
    ground = 1 - functional.max_pool2d(body[:, None], 5, 1, 2)[:, 0]
    space = ground.mean((1, 2))
    light = pictures_M3HW.mean(1)
    dx = (light[:, :, 1:] - light[:, :, :-1]).abs() * ground[:, :, 1:] * ground[:, :, :-1]
    dy = (light[:, 1:] - light[:, :-1]).abs() * ground[:, 1:] * ground[:, :-1]
    rough = (dx.mean((1, 2)) + dy.mean((1, 2))) / space.clamp_min(0.05)
    stray = ((blobs.share_MHW > 0.35).float() * ground).mean((1, 2)) / space.clamp_min(0.05)
    level = (light * ground).mean((1, 2)) / space.clamp_min(0.05)
    return torch.stack((space, rough, stray, level), 1)


def _world_likeness(measures_BF4: Tensor) -> list[float]:
    """Return one value per clip: 1 if the surroundings are calm and nearly grey, 0 for any other content."""
    level = measures_BF4[..., 3]
    jumps = (level[:, 1:] / level[:, :-1].clamp_min(1e-3)).clamp_min(1e-3).log().abs().amax(1)
    rows = zip(measures_BF4.mean(1).tolist(), jumps.tolist(), strict=True)
    return [_likeness(m[0], m[1], m[2], m[3], jump) for m, jump in rows]


def _likeness(space: float, rough: float, stray: float, level: float, jump: float) -> float:
    return min(
        events.ramp(jump, 0.24, 0.08),
        events.ramp(space, 0.3, 0.5),
        events.ramp(rough, 0.05, 0.03),
        events.ramp(stray, 0.08, 0.03),
        events.ramp(level, 0.12, 0.25),
    )


def _misfits(blobs: Blobs) -> Tensor:
    """Return the shape measures of every blob (M,K,9); `inf` for a blob that is not examined.

    The columns are the misfit with each shape, the advantage of a foreign outline over each shape, and both kinds of
    `roundness`.
    """
    result = blobs.area.new_full((*blobs.area.shape, 2 * len(SHAPES) + 3), torch.inf)
    pixels = blobs.slot_MP.shape[1]
    chosen = blobs.valid & (blobs.area >= 0.5 * BODY_AREA * pixels)
    picture, slot = chosen.nonzero(as_tuple=True)
    for low in range(0, len(picture), 512):
        part = slice(low, low + 512)
        area = blobs.area[picture[part], slot[part]]
        coarse, fine = views(blobs, picture[part], slot[part], GRID, edges.CELLS)
        window, soft = windows(coarse, area), edges.roundness(fine, area)[:, None]
        features = shape_features(*window)
        misfit = features[:, 0] + _SHADING * features[:, 1]
        result[picture[part], slot[part]] = torch.cat((misfit, features[:, 2], roundness(*window), soft), 1)
    return result
