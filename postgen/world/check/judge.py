"""The judge: compares what a clip shows with what the prompt or scene requests."""

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

#: Largest number of clips, and of their pixels, that are processed together; more are faster on a GPU but need memory:
#: 110 bytes per pixel.
_AT_ONCE = {"cpu": (16, 2**23), "cuda": (64, 2**26)}
#: Largest number of pixels of one clip that is processed at once. A larger clip is processed in windows.
_ONE = {"cpu": 2**21, "cuda": 2**24}


def check(frames: Tensor, spec_or_prompt: Spec | str | Reading) -> Report:
    """Judge one clip against a scene or a prompt, from its pixels alone.

    The judge checks the number of bodies; their colour, shape and event; their place and direction, if the prompt
    gives them; that each body stays the same object in every frame; that nothing else is visible except shadows; and
    the camera move, if one is requested (events are not judged in that case). It does not judge sizes, the floor, the
    light or the exact layout of a spec. If a prompt names a size or a floor, contains a negation or unknown words,
    some of its clauses cannot be judged (`Report.clauses`), and no clip of it is `all_right`.

    Args:
        frames: clip (F,3,H,W) in [0,1], F >= 5, designed for 64 to 192 px; a clip above 1,024 px is reduced to at most
            512 px. For a still, repeat the picture.
        spec_or_prompt: the requested content; `world.parse` reads a prompt.

    Raises:
        UserError: frames of another shape or dtype, values outside [0,1], or a prompt that names no body of the world.

    >>> import torch
    >>> check(torch.rand(5, 3, 64, 64), "a red ball moves left").score < 0.2
    True
    """
    if frames.ndim != 4:
        raise UserError(f"check needs a clip (F,3,H,W), not {tuple(frames.shape)}; use check_batch for several clips.")
    return check_batch(frames[None], [spec_or_prompt])[0]


@torch.no_grad()
def check_batch(clips: Tensor, specs: Sequence[Spec | str | Reading], *, workers: int = 0) -> list[Report]:
    """Judge clips (B,F,3,H,W), each against its own scene or prompt; see `check`.

    Args:
        clips, specs: as in `check`, one spec per clip.
        workers: number of processes that track and judge the bodies while the device processes further clips; 0 judges
            in the calling process. The first call starts the processes, and later calls reuse them. The reports are
            the same. Processes pay off for clips on a GPU.

    Raises:
        UserError: as in `check`, a different number of clips and specs, or a negative number of workers.
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
    """Return the bodies of each clip (B,F,3,H,W) with their trajectories, independent of any request.

    Raises:
        UserError: as in `check`.
    """
    check_form(clips.shape)
    check_values(clips)
    return [tracks for _, sight in _sights(clips) for tracks in sight.tracks()]


@torch.no_grad()
def check_long(windows: Windows, spec_or_prompt: Spec | str | Reading, *, workers: int = 0) -> Report:
    """Judge one clip that does not fit into memory. The report equals that of `check`, up to rounding.

    Args:
        windows: function that returns the clip from its start at each call (two or three calls), as consecutive
            windows (f,3,H,W) of any lengths.
        spec_or_prompt: as in `check`.
        workers: as in `check_batch`.

    Raises:
        UserError: as in `check`.
        WorkerDied: as in `check_batch`.
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
    """Return the bodies of one clip as `find_tracks` does; the clip is given in windows as for `check_long`.

    Raises:
        UserError: as in `check`.
    """
    return next(iter(look_along(windows).tracks()))


def _sights(clips: Tensor, cameras: Sequence[str] = ()) -> Iterator[tuple[int, Sight]]:
    """Yield the index of the first clip of each group, and the observations of the clips in the group."""
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
