"""The judge: what a clip shows against what was asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from postgen.errors import UserError
from postgen.world.check import events
from postgen.world.check.segment import Blobs, colour_share, find_blobs, smooth
from postgen.world.check.shapes import shape_features
from postgen.world.check.tracks import BODY_AREA, Piece, Track, follow
from postgen.world.spec import COLOURS, SHAPES, Spec

#: Clips looked at together; more are faster on a GPU and take memory.
_AT_ONCE = {"cpu": 16, "cuda": 64}
_SHADING = 0.1
#: Misfit above which an outline is none of the shapes, and the difference of misfits that is a sure answer.
_NO_SHAPE, _SURE = 0.14, 0.03
_SHARP = (0.10, 0.16)
#: A body with a softer rim than this is a smear, and the picture none of this world.
_SMEAR = (0.06, 0.12)
#: Score of a clip with the wrong number of bodies, at most.
_WRONG_COUNT = 0.15
_MOVES = ("moves left", "moves right", "moves closer", "moves away")


@dataclass(frozen=True, kw_only=True, slots=True)
class BodyReport:
    """What was found for one body that was asked for. Values in [0,1], yes from 0.5; None: was not judged.

    `found_*` name what the pixels show (None: nothing). `track` is one (x, y, area) a frame in parts of the picture,
    None where the body is not seen.
    """

    colour: float
    shape: float
    event: float | None
    direction: float | None
    found_colour: str | None = None
    found_shape: str | None = None
    found_event: str | None = None
    track: tuple[tuple[float, float, float] | None, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Judgement of a clip.

    `score` in [0,1] is the mean of the judged values over the bodies, at most 0.15 with a wrong count, times `world`
    in [0,1] (is it a picture of this world at all: calm, nearly grey surroundings, bodies with a rim). `count`,
    `colour`, `shape`, `direction`, `event`: whether that is right for every body; None where nothing asks for it (no
    move, a camera that moves). `found_count` is the number of bodies seen.
    """

    score: float
    world: float
    count: bool
    colour: bool
    shape: bool
    direction: bool | None
    event: bool | None
    all_right: bool
    found_count: int
    bodies: tuple[BodyReport, ...]


def check(frames: Tensor, spec_or_prompt: Spec | str) -> Report:
    """Judge one clip against a scene or a prompt, from its pixels alone.

    Colour, shape, event and the number of bodies are judged; size, place, background, light and the exact layout of
    the spec are not. With a moving camera the events are not judged either (nor is the camera itself).

    Args:
        frames: clip (F,3,H,W) in [0,1], F >= 5, meant for 64 to 128 px.
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
def check_batch(clips: Tensor, specs: Sequence[Spec | str]) -> list[Report]:
    """Judge clips (B,F,3,H,W) against one scene or prompt each; see `check`."""
    _check_form(clips)
    if len(clips) != len(specs):
        raise UserError(f"check got {len(clips)} clips and {len(specs)} specs: give one spec a clip.")
    scenes = [_scene(spec) for spec in specs]
    found = (look for part in clips.split(_AT_ONCE.get(clips.device.type, 16)) for look in _look(part))
    return [
        _judge(tracks, scene, likeness, clips.shape[1])
        for (tracks, likeness), scene in zip(found, scenes, strict=True)
    ]


@torch.no_grad()
def find_tracks(clips: Tensor) -> list[list[Track]]:
    """Return the bodies of each clip (B,F,3,H,W) with their way through the frames, whatever was asked for.

    Raises:
        UserError: as `check`.
    """
    _check_form(clips)
    return [tracks for part in clips.split(_AT_ONCE.get(clips.device.type, 16)) for tracks, _ in _look(part)]


def _check_form(clips: Tensor) -> None:
    if clips.ndim != 5 or clips.shape[2] != 3 or clips.shape[1] < 5 or min(clips.shape[-2:]) < 32:
        raise UserError(f"check needs clips (B,F,3,H,W) with F >= 5 and at least 32 px, not {tuple(clips.shape)}.")


def _look(clips: Tensor) -> Iterator[tuple[list[Track], float]]:
    """Bodies of each clip, and how much it looks like the world."""
    clips = clips.detach().float().nan_to_num(0.5).clamp(0, 1)
    frames = clips.shape[1]
    pictures = smooth(clips.flatten(0, 1))
    blobs = find_blobs(pictures)
    likeness = world_likeness(pictures, blobs, frames)
    table = _Table(blobs, _misfits(blobs))
    for b in range(len(clips)):
        yield follow([table.pieces(b * frames + f) for f in range(frames)]), likeness[b]


def _scene(spec: Spec | str) -> Spec:
    if isinstance(spec, Spec):
        return spec
    from postgen.world.parse import parse

    scene = parse(spec)
    if scene is None:
        raise UserError(f"The prompt {spec!r} names no body of the world: write for instance 'a red ball moves left'.")
    return scene


def world_likeness(pictures_M3HW: Tensor, blobs: Blobs, frames: int) -> list[float]:
    """1 for clips whose surroundings are calm and nearly grey, 0 for anything else; one value a clip."""
    height, width = pictures_M3HW.shape[-2:]
    body = (blobs.slot_MP >= 0).float().reshape(-1, height, width)
    share, _, _ = colour_share(pictures_M3HW)
    ground = 1 - functional.max_pool2d(body[:, None], 5, 1, 2)[:, 0]
    space = ground.mean((1, 2))
    light = pictures_M3HW.mean(1)
    dx = (light[:, :, 1:] - light[:, :, :-1]).abs() * ground[:, :, 1:] * ground[:, :, :-1]
    dy = (light[:, 1:] - light[:, :-1]).abs() * ground[:, 1:] * ground[:, :-1]
    rough = (dx.mean((1, 2)) + dy.mean((1, 2))) / space.clamp_min(0.05)
    stray = ((share > 0.35).float() * ground).mean((1, 2)) / space.clamp_min(0.05)
    level = (light * ground).mean((1, 2)) / space.clamp_min(0.05)
    measures = torch.stack((space, rough, stray, level), 1).reshape(-1, frames, 4).mean(1).tolist()
    return [_likeness(*m) for m in measures]


def _likeness(space: float, rough: float, stray: float, level: float) -> float:
    return min(
        events.ramp(space, 0.3, 0.5),
        events.ramp(rough, 0.05, 0.03),
        events.ramp(stray, 0.08, 0.03),
        events.ramp(level, 0.12, 0.25),
    )


def _misfits(blobs: Blobs) -> Tensor:
    """Misfit of every blob with every shape (M,K,3), `inf` where it is not looked at."""
    result = blobs.area.new_full((*blobs.area.shape, len(SHAPES)), torch.inf)
    pixels = blobs.slot_MP.shape[1]
    chosen = blobs.valid & (blobs.area >= 0.5 * BODY_AREA * pixels)
    picture, slot = chosen.nonzero(as_tuple=True)
    for low in range(0, len(picture), 512):
        part = slice(low, low + 512)
        features = shape_features(blobs, picture[part], slot[part])
        result[picture[part], slot[part]] = features[:, 0] + _SHADING * features[:, 1]
    return result


class _Table:
    """Blobs on the host, as pieces: fragments of one colour that hang together are one body."""

    def __init__(self, blobs: Blobs, misfit_MK3: Tensor) -> None:
        self.height, self.width = blobs.hue_MHW.shape[1:]
        columns = (
            blobs.valid,
            blobs.colour,
            blobs.group,
            blobs.touch,
            blobs.border,
            blobs.area,
            blobs.x,
            blobs.y,
            blobs.sharp,
        )
        table = torch.cat(
            (torch.stack([c.double() for c in columns], -1), blobs.box.double(), misfit_MK3.double()), -1
        )
        self.rows: list[list[list[float]]] = table.tolist()

    def pieces(self, picture: int) -> dict[int, list[Piece]]:
        """Pieces of a picture by colour, the largest first."""
        parts: dict[tuple[float, float], list[list[float]]] = {}
        for row in self.rows[picture]:
            if row[0]:
                parts.setdefault((row[1], row[2]), []).append(row)
        result: dict[int, list[Piece]] = {}
        for (colour, _), part in parts.items():
            result.setdefault(int(colour), []).append(self._piece(part))
        for pieces in result.values():
            pieces.sort(key=lambda p: -p.area)
        return result

    def _piece(self, rows: list[list[float]]) -> Piece:
        whole = len(rows) == 1 and rows[0][13] < torch.inf
        area = sum(row[5] for row in rows)
        x, y, sharp = (sum(row[k] * row[5] for row in rows) / area for k in (6, 7, 8))
        low = [min(row[k] for row in rows) for k in (9, 10)]
        high = [max(row[k] for row in rows) + 1 for k in (11, 12)]
        return Piece(
            x=(x + 0.5) / self.width,
            y=(y + 0.5) / self.height,
            area=area / (self.width * self.height),
            box=(low[0] / self.width, low[1] / self.height, high[0] / self.width, high[1] / self.height),
            touch=any(row[3] for row in rows),
            border=any(row[4] for row in rows),
            whole=whole,
            sharp=sharp,
            misfit=tuple(rows[0][13:16]) if whole else None,
            group=int(rows[0][2]),
        )


@dataclass(slots=True)
class _Candidate:
    """A body that was found, and what is asked of it again and again."""

    track: Track
    ways: list[events.Way]
    misfit: tuple[NDArray[np.float64], float] | None


def _judge(tracks: list[Track], scene: Spec, likeness: float, frames: int) -> Report:
    wanted = len(scene.bodies)
    there = np.zeros(frames)
    for track in tracks:
        there += track.seen | np.array(track.hidden)
    share = float((there == wanted).mean())
    found = len(tracks)
    count = found == wanted and share >= 0.75 and likeness > 0
    candidates = [_Candidate(track, events.ways(track), _misfit(track)) for track in tracks]
    sharp = [c.misfit[1] for c in candidates if c.misfit is not None]
    likeness *= events.ramp(float(np.mean(sharp)), *_SMEAR) if sharp else 0.0
    bodies = _match(candidates, scene)
    values = [[v for v in (b.colour, b.shape, b.direction, b.event) if v is not None] for b in bodies]
    score = float(np.mean([np.mean(v) for v in values])) * likeness
    score *= events.ramp(share, 0.3, 1.0) if count else _WRONG_COUNT
    colour, shape = all(b.colour >= 0.5 for b in bodies), all(b.shape >= 0.5 for b in bodies)
    direction, event = _all([b.direction for b in bodies]), _all([b.event for b in bodies])
    return Report(
        score=score,
        world=likeness,
        count=count,
        colour=colour,
        shape=shape,
        direction=direction,
        event=event,
        all_right=count and colour and shape and direction is not False and event is not False and likeness >= 0.5,
        found_count=found,
        bodies=bodies,
    )


def _all(values: list[float | None]) -> bool | None:
    judged = [v for v in values if v is not None]
    return all(v >= 0.5 for v in judged) if judged else None


def _match(found: list[_Candidate], scene: Spec) -> tuple[BodyReport, ...]:
    """Give each body asked for one that is there, so that as much as possible is right; colour weighs most."""
    found = sorted(found, key=lambda c: -c.track.seen.sum())[:5]
    slots: list[_Candidate | None] = [*found, *[None] * max(0, len(scene.bodies) - len(found))]
    looks = [[_looks(one, body.colour, body.shape) for one in slots] for body in scene.bodies]

    @cache
    def event(b: int, own: int, partner: int | None) -> float:
        return _event_value(scene, b, slots[own], None if partner is None else slots[partner]) or 0.0

    best: tuple[float, tuple[int, ...]] = (-1.0, ())
    for choice in itertools.permutations(range(len(slots)), len(scene.bodies)):
        value = sum(2 * looks[b][t][0] + looks[b][t][1] for b, t in enumerate(choice))
        partners = (None if body.partner is None else choice[body.partner] for body in scene.bodies)
        value += 0.1 * sum(event(b, t, partner) for (b, t), partner in zip(enumerate(choice), partners, strict=True))
        if value > best[0]:
            best = value, choice
    chosen = [slots[t] for t in best[1]]
    return tuple(_body_report(scene, b, chosen) for b in range(len(chosen)))


def _looks(found: _Candidate | None, colour: str, shape: str) -> tuple[float, float]:
    if found is None:
        return 0.0, 0.0
    names = list(COLOURS)
    seen = [c for c in found.track.colours if c >= 0]
    share = sum(c == names.index(colour) for c in seen) / len(seen)
    return events.ramp(share, 0.5, 1.0), _shape_value(found, shape)


def _misfit(track: Track) -> tuple[NDArray[np.float64], float] | None:
    """Median misfit with every shape over the frames with a clean outline, and the median sharpness of the rim.

    Without two clean frames, the third of the frames in which most of the body is seen.
    """
    clean = track.clean()
    pieces = [p for f in clean if (p := track.pieces[f]) is not None and p.misfit is not None]
    if len(pieces) < 2:
        pieces = sorted((p for p in track.pieces if p is not None and p.misfit is not None), key=lambda p: -p.area)
        pieces = pieces[: max(1, len(pieces) // 3)]
    if not pieces:
        return None
    return np.median([p.misfit for p in pieces], 0), float(np.median([p.sharp for p in pieces]))


def _shape_value(found: _Candidate, shape: str) -> float:
    """How surely a body has a shape, in [0,1]."""
    if found.misfit is None:
        return 0.0
    misfit, sharp = found.misfit
    own = misfit[SHAPES.index(shape)]
    other = min(m for m, name in zip(misfit, SHAPES, strict=True) if name != shape)
    return min(
        events.ramp(float(other - own), -_SURE, _SURE),
        events.ramp(float(own), _NO_SHAPE * 1.5, _NO_SHAPE * 0.5),
        events.ramp(sharp, *_SHARP),
    )


def _event_value(scene: Spec, index: int, found: _Candidate | None, other: _Candidate | None) -> float | None:
    """Value of the event of a body, `other` its partner; None for a moving camera and the partner of a collision."""
    body = scene.bodies[index]
    hit = any(b.partner == index and b.event == "collides" for b in scene.bodies)
    if scene.camera != "static" or hit:
        return None
    if found is None:
        return 0.0
    if body.partner is None:
        return max(map(events.SINGLE[body.event], found.ways))
    return 0.0 if other is None else events.PAIR[body.event](found.track, other.track)


def _body_report(scene: Spec, index: int, chosen: list[_Candidate | None]) -> BodyReport:
    body, found = scene.bodies[index], chosen[index]
    asked = body.event in _MOVES and scene.camera == "static"
    event = _event_value(scene, index, found, None if body.partner is None else chosen[body.partner])
    if found is None:
        return BodyReport(colour=0.0, shape=0.0, event=event, direction=0.0 if asked else None)
    colour, shape = _looks(found, body.colour, body.shape)
    ranked = {name: max(map(value, found.ways)) for name, value in events.SINGLE.items()}
    for other in chosen:
        if other is not None and other is not found:
            for name, pair in events.PAIR.items():
                ranked[name] = max(ranked.get(name, 0.0), pair(found.track, other.track))
    # What a body does with another one says more than its own way does.
    top = max(ranked, key=lambda name: (name in events.PAIR and ranked[name] >= 0.5, ranked[name]))
    return BodyReport(
        colour=colour,
        shape=shape,
        event=event,
        direction=max(events.heading(way, body.event) for way in found.ways) if asked else None,
        found_colour=list(COLOURS)[found.track.colour],
        found_shape=max(SHAPES, key=lambda name: _shape_value(found, name)) if found.misfit is not None else None,
        found_event=top if ranked[top] >= 0.5 and scene.camera == "static" else None,
        track=tuple(None if p is None else (p.x, p.y, p.area) for p in found.track.pieces),
    )
