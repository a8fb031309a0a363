"""The judge: what a clip shows against what was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.world.check.look import Windows, check_form, check_values, look, look_along
from postgen.world.check.report import Report, judge
from postgen.world.check.sight import Sight
from postgen.world.check.tracks import Track
from postgen.world.check.workers import pool_of
from postgen.world.reading import Reading
from postgen.world.spec import Spec

#: Clips looked at together, and most pixels of them; more are faster on a GPU and take memory, 110 bytes a pixel.
_AT_ONCE = {"cpu": (16, 2**23), "cuda": (64, 2**26)}
#: Most pixels of one clip that are looked at at once. A longer one is gone through in windows.
_ONE = {"cpu": 2**21, "cuda": 2**24}


def check(frames: Tensor, spec_or_prompt: Spec | str | Reading) -> Report:
    """Judge one clip against a scene or a prompt, from its pixels alone.

    Judged are the number of bodies, their colour, shape and event, where the prompt puts them and which way they go;
    that each is the same thing in every frame, with nothing beside it but shadows; and the camera where one is asked
    for (the events are not judged then). Not judged are the sizes, the floor, the light and the exact layout of a
    spec; a prompt that names a size or a floor, denies something or holds unknown words has clauses that cannot be
    judged (`Report.clauses`), and no clip of it is `all_right`.

    Args:
        frames: clip (F,3,H,W) in [0,1], F >= 5, meant for 64 to 192 px; one above 1,024 px is brought to 512 at most.
            A still is a clip that repeats.
        spec_or_prompt: what should be there; a prompt is read by `world.parse`.

    Raises:
        UserError: frames of another form, bytes or values outside [0,1], or a prompt that names no body of the world.

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
    check_form(clips.shape)
    check_values(clips)
    if len(clips) != len(specs):
        raise UserError(f"check got {len(clips)} clips and {len(specs)} specs: give one spec a clip.")
    _check_workers(workers)
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
    check_form(clips.shape)
    check_values(clips)
    return [tracks for _, sight in _sights(clips) for tracks in sight.tracks()]


@torch.no_grad()
def check_long(windows: Windows, spec_or_prompt: Spec | str | Reading, *, workers: int = 0) -> Report:
    """Judge one clip that is too long for the memory; the report is that of `check`, up to rounding.

    Args:
        windows: gives the clip from its start each time it is called (two or three times), in windows (f,3,H,W) of
            any lengths that follow each other.
        spec_or_prompt: as for `check`.
        workers: as for `check_batch`.

    Raises:
        UserError: as `check`.
        WorkerDied: as `check_batch`.
    """
    _check_workers(workers)
    asked = [_reading(spec_or_prompt)]
    sight = look_along(windows, asked[0].scene.camera)
    if not workers:
        return judge(sight, asked)[0]
    with pool_of(workers) as pool:
        return pool.submit(sight, asked)[0].result()[0]


@torch.no_grad()
def find_tracks_long(windows: Windows) -> list[Track]:
    """As `find_tracks`, of one clip in windows as for `check_long`.

    Raises:
        UserError: as `check`.
    """
    return next(iter(look_along(windows).tracks()))


def _sights(clips: Tensor, cameras: Sequence[str] = ()) -> Iterator[tuple[int, Sight]]:
    """Number of the first clip, and what is seen in it and the next ones."""
    kind = clips.device.type
    most, room = _AT_ONCE.get(kind, _AT_ONCE["cpu"])
    pixels = clips[0, :, 0].numel() if len(clips) else 1
    if pixels > (one := _ONE.get(kind, _ONE["cpu"])):
        size = max(1, one // (2 * clips[0, 0, 0].numel()))
        for low, clip in enumerate(clips):
            windows = clip.split(size)
            yield low, look_along(partial(iter, windows), cameras[low] if cameras else "static")
        return
    step = min(most, max(1, room // pixels))
    for low in range(0, len(clips), step):
        yield low, look(clips[low : low + step], cameras[low : low + step])


def _check_workers(workers: int) -> None:
    if workers < 0:
        raise UserError(f"check got workers={workers}: give 0 or more.")


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
