"""The judge: what a clip shows against what was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from postgen.errors import UserError
from postgen.world.check import events
from postgen.world.check.facets import roundness
from postgen.world.check.film import filmed
from postgen.world.check.ground import balance, find_spots
from postgen.world.check.pieces import COLUMNS
from postgen.world.check.report import Report, judge
from postgen.world.check.segment import Blobs, find_blobs, smooth
from postgen.world.check.shapes import shape_features, windows
from postgen.world.check.sight import Sight
from postgen.world.check.tracks import BODY_AREA, Track
from postgen.world.check.workers import pool_of
from postgen.world.reading import Reading
from postgen.world.spec import SHAPES, Spec

#: Clips looked at together; more are faster on a GPU and take memory.
_AT_ONCE = {"cpu": 16, "cuda": 64}
_SHADING = 0.1


def check(frames: Tensor, spec_or_prompt: Spec | str | Reading) -> Report:
    """Judge one clip against a scene or a prompt, from its pixels alone.

    Judged are the number of bodies, their colour, shape and event, where the prompt puts them and which way they go;
    that each is the same thing in every frame, with nothing beside it but shadows; and the camera where one is asked
    for (the events are not judged then). Not judged are the sizes, the floor, the light and the exact layout of a
    spec; a prompt that names a size or a floor, denies something or holds unknown words has clauses that cannot be
    judged (`Report.clauses`), and no clip of it is `all_right`.

    Args:
        frames: clip (F,3,H,W) in [0,1], F >= 5, meant for 64 to 192 px; a still is a clip that repeats.
        spec_or_prompt: what should be there; a prompt is read by `world.parse`.

    Raises:
        UserError: frames of another form, or a prompt that names no body of the world.

    >>> import torch
    >>> check(torch.rand(5, 3, 64, 64), "a red ball moves left").score < 0.2
    True
    """
    if frames.ndim != 4:
        raise UserError(f"check needs a clip (F,3,H,W), not {tuple(frames.shape)}; check_batch takes several.")
    return check_batch(frames[None], [spec_or_prompt])[0]


@torch.no_grad()
def check_batch(clips: Tensor, specs: Sequence[Spec | str | Reading], *, workers: int = 0) -> list[Report]:
    """Judge clips (B,F,3,H,W) against one scene or prompt each; see `check`.

    Args:
        clips, specs: as in `check`, one spec a clip.
        workers: processes that follow and judge the bodies while the device looks at further clips; 0 does that here.
            They are started at the first call and kept; the reports are the same. Worth it for clips on a GPU.

    Raises:
        UserError: as `check`, or fewer than 0 workers.
        WorkerDied: a process was killed; the next call starts new ones.
    """
    _check_form(clips)
    if len(clips) != len(specs):
        raise UserError(f"check got {len(clips)} clips and {len(specs)} specs: give one spec a clip.")
    if workers < 0:
        raise UserError(f"check got workers={workers}: give 0 or more.")
    asked = [_reading(spec) for spec in specs]
    sights = _sights(clips, [reading.scene.camera for reading in asked])
    if not workers:
        return [report for low, sight in sights for report in judge(sight, asked[low : low + len(sight)])]
    with pool_of(workers) as pool:
        jobs = [job for low, sight in sights for job in pool.submit(sight, asked[low : low + len(sight)])]
        return [report for job in jobs for report in job.result()]


@torch.no_grad()
def find_tracks(clips: Tensor) -> list[list[Track]]:
    """Return the bodies of each clip (B,F,3,H,W) with their way through the frames, whatever was asked for.

    Raises:
        UserError: as `check`.
    """
    _check_form(clips)
    return [tracks for _, sight in _sights(clips) for tracks in sight.tracks()]


def _check_form(clips: Tensor) -> None:
    if clips.ndim != 5 or clips.shape[2] != 3 or clips.shape[1] < 5 or min(clips.shape[-2:]) < 32:
        raise UserError(f"check needs clips (B,F,3,H,W) with F >= 5 and at least 32 px, not {tuple(clips.shape)}.")


def _sights(clips: Tensor, cameras: Sequence[str] = ()) -> Iterator[tuple[int, Sight]]:
    """Number of the first clip, and what is seen in it and the next ones."""
    step = _AT_ONCE.get(clips.device.type, 16)
    for low in range(0, len(clips), step):
        yield low, _look(clips[low : low + step], cameras[low : low + step])


def _look(clips: Tensor, cameras: Sequence[str] = ()) -> Sight:
    """Blobs and spots of each clip, how much it looks like the world, and how far its camera goes the asked way."""
    clips = clips.detach().float().nan_to_num(0.5).clamp(0, 1)
    frames = clips.shape[1]
    pictures = smooth(clips.flatten(0, 1))
    gain = balance(pictures, frames)
    blobs = find_blobs(pictures, gain)
    body = (blobs.slot_MP >= 0).reshape(-1, *pictures.shape[-2:])
    spots = find_spots(pictures if gain is None else pictures * gain, body).double().cpu().numpy()
    columns = torch.stack([getattr(blobs, name).double() for name in ("valid", *COLUMNS[:-4])], -1)
    values = torch.cat((columns, blobs.box.double(), _misfits(blobs).double()), -1)
    likeness = world_likeness(pictures, blobs, frames)
    table = values.cpu().numpy()
    valid = table[..., 0] > 0
    return Sight(
        rows_NC=table[valid][:, 1:],
        count_BF=valid.sum(1).reshape(-1, frames),
        spots_MSC=spots,
        height=clips.shape[-2],
        width=clips.shape[-1],
        likeness=likeness,
        film=[None] * (len(clips)) if all(c == "static" for c in cameras) else filmed(pictures, body, cameras),
    )


def _reading(asked: Spec | str | Reading) -> Reading:
    if isinstance(asked, Reading):
        return asked
    if isinstance(asked, Spec):
        return Reading.of(asked)
    from postgen.world.parse import read

    reading = read(asked)
    if reading is None:
        raise UserError(
            f"The prompt {asked!r} names no body of the world: write for instance 'a red ball moves left'."
        )
    return reading


def world_likeness(pictures_M3HW: Tensor, blobs: Blobs, frames: int) -> list[float]:
    """1 for clips whose surroundings are calm and nearly grey, 0 for anything else; one value a clip."""
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
    measures = torch.stack((space, rough, stray, level), 1).reshape(-1, frames, 4)
    jumps = (measures[:, 1:, 3] / measures[:, :-1, 3].clamp_min(1e-3)).clamp_min(1e-3).log().abs().amax(1)
    rows = zip(measures.mean(1).tolist(), jumps.tolist(), strict=True)
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
    """Misfit of every blob with every shape, what fits better, and `roundness` (M,K,8); `inf` if not looked at."""
    result = blobs.area.new_full((*blobs.area.shape, 2 * len(SHAPES) + 2), torch.inf)
    pixels = blobs.slot_MP.shape[1]
    chosen = blobs.valid & (blobs.area >= 0.5 * BODY_AREA * pixels)
    picture, slot = chosen.nonzero(as_tuple=True)
    for low in range(0, len(picture), 512):
        part = slice(low, low + 512)
        window = windows(blobs, picture[part], slot[part])
        features = shape_features(*window)
        misfit = features[:, 0] + _SHADING * features[:, 1]
        result[picture[part], slot[part]] = torch.cat((misfit, features[:, 2], roundness(*window)), 1)
    return result
