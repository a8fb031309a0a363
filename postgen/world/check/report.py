"""Compare what a clip shows with the request: the part of the judge in plain Python, one clip at a time.

This module does not import torch, so that a process of `workers` starts fast and stays small.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from statistics import median
from typing import Any

import numpy as np

from postgen.world.check import contact, events, steady, surroundings
from postgen.world.check.pairs import PAIR
from postgen.world.check.sight import Sight
from postgen.world.check.tracks import Track, bodies, follow
from postgen.world.reading import Clause, Reading
from postgen.world.spec import COLOURS, SHAPES, Spec

#: Ends of the ramp over the advantage of a foreign outline over a ball, a cube, a cylinder: surely not this shape,
#: surely this shape.
_ODD = ((0.006, -0.002), (0.0, -0.04), (0.03, -0.01))
#: Ends of the ramps over the greatest brightness relative to that of the named colour, and over the share of that
#: colour: another colour, this colour.
_LIGHT, _PURE = (0.55, 0.72), (0.62, 0.8)
#: Ends of the ramp over the misfit with a ball, a cube, a cylinder: not this shape, surely this shape; below, the
#: difference of two misfits that is certain.
_MISFIT = ((0.12, 0.06), (0.18, 0.07), (0.18, 0.07))
_SURE = 0.03
_SHARP = (0.10, 0.16)
#: Ends of the ramp over the sharpness of the rims: below the first value, bodies are smears and the picture does not
#: show this world.
_SMEAR = (0.06, 0.12)
#: Factor of the score for one value of 0, and for a wrong number of bodies.
_FLOOR = 0.15
#: Factor of the score if a clause of the prompt cannot be judged.
_UNREADABLE = 0.45
#: Ends of the ramp over the camera's distance, relative to the usual one: not the requested move, the requested move.
_FILM = (0.2, 0.7)
_MOVES = ("moves left", "moves right", "moves closer", "moves away")


@dataclass(frozen=True, kw_only=True, slots=True)
class BodyReport:
    """Findings for one requested body. Values are in [0,1], and 0.5 or more means yes; None means not judged.

    `found_*` name what the pixels show (None: nothing). `track` has one (x, y, area) per frame, relative to the
    picture, and None where the body is not visible.
    """

    colour: float
    shape: float
    event: float | None
    direction: float | None
    steady: float = 0.0
    found_colour: str | None = None
    found_shape: str | None = None
    found_event: str | None = None
    track: tuple[tuple[float, float, float] | None, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Judgement of a clip.

    `score` in [0,1] is a product of the judged values of each body (their geometric mean over the bodies), of the
    count, and of `world` in [0,1]: does the picture show this world at all, with calm, nearly grey surroundings and
    bodies with a sharp rim? A value v enters the product as 0.15 + 0.85 v, so no other value can compensate for a
    wrong one. `count`, `colour`, `shape`, `direction`, `event`: whether the property is right for every body; None if
    nothing requests it (no move, or a camera that moves). `steady`: every body is present in every frame and keeps its
    size and its brightness, and nothing else appears. `found_count` is the number of visible bodies, `strange` the
    number of frames with other objects.
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
    steady: bool = True
    strange: int = 0
    #: Whether the camera moves as requested; None if it should stand still.
    camera: bool | None = None
    #: Parts of the prompt, each with the reason if it cannot be judged; empty for a scene.
    clauses: tuple[Clause, ...] = ()

    @property
    def readable(self) -> bool:
        """Whether every clause of the prompt can be judged; otherwise no clip is `all_right`."""
        return all(clause.readable for clause in self.clauses)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; `from_dict` reads it back, with floats exact to the last digit."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Read the JSON form of `to_dict`."""
        bodies = tuple(
            BodyReport(**{**body, "track": tuple(None if place is None else tuple(place) for place in body["track"])})
            for body in data["bodies"]
        )
        return cls(**{**data, "bodies": bodies, "clauses": tuple(Clause(**clause) for clause in data["clauses"])})


def judge(sight: Sight, asked: Sequence[Spec | Reading]) -> list[Report]:
    """Judge clips, each against one scene.

    Args:
        sight: observations of the clips.
        asked: one scene or reading per clip.
    """
    reports = []
    clips = zip(sight.pieces(), sight.spots(), sight.likeness, sight.film, strict=True)
    for (found, spotted, likeness, film), wish in zip(clips, asked, strict=True):
        tracks = follow(found)
        strange = surroundings.strangers(tracks, spotted, [list(itertools.chain(*f.values())) for f in found])
        tracks = bodies(tracks)
        reading = Reading.of(wish) if isinstance(wish, Spec) else wish
        reports.append(_report(tracks, reading, likeness, strange, film))
    return reports


class _Candidate:
    """A body that was found, with cached values of the tests."""

    def __init__(self, track: Track, apart: float = 1.0) -> None:
        self.track = track
        self.apart = apart
        self.ways = events.ways(track)
        self.misfit = _misfit(track)
        self._pairs: dict[tuple[str, int], float] = {}

    @cached_property
    def alone(self) -> dict[str, float]:
        """Value of each event of one body."""
        return {name: max(map(value, self.ways)) for name, value in events.SINGLE.items()}

    def beside(self, event: str, other: _Candidate) -> float:
        """Return the value of an event of two bodies, with the other one as partner."""
        key = (event, id(other))
        if key not in self._pairs:
            self._pairs[key] = PAIR[event](self.track, other.track)
        return self._pairs[key]

    def colour(self, name: str) -> float:
        """Return how certainly the body has a colour, in [0,1]."""
        least = 0.3 * events.large([p.area for p in self.track.pieces if p is not None])
        pairs = zip(self.track.pieces, self.track.colours, strict=True)
        seen = [(p, c) for p, c in pairs if p is not None and p.area >= least]
        own = [p for p, c in seen if c == list(COLOURS).index(name)]
        if not own:
            return 0.0
        return min(
            events.ramp(1 - len(own) / len(seen), 0.2, 0.0),
            events.ramp(max(p.light for p in own), *_LIGHT),
            events.ramp(median(p.pure for p in own), *_PURE),
        )

    @cached_property
    def steady(self) -> float:
        """Whether the body stays the same object in every frame, in [0,1]."""
        track = self.track
        same = min(steady.presence(track), steady.size(track), steady.light(track), steady.hue(track))
        return min(same, self.apart)

    @cached_property
    def shapes(self) -> dict[str, float]:
        """How certainly the body has each shape, in [0,1]."""
        if self.misfit is None:
            return dict.fromkeys(SHAPES, 0.0)
        return {
            shape: min(_shape_value(*self.misfit, shape), steady.shape(self.track, k), steady.edges(self.track, shape))
            for k, shape in enumerate(SHAPES)
        }


def _report(tracks: list[Track], reading: Reading, likeness: float, strange: int, film: float | None) -> Report:
    # The count: bodies in the clip, and the share of frames that show the requested number.
    wanted, frames = len(reading.scene.bodies), len(tracks[0].pieces) if tracks else 1
    there = [sum(present) for present in zip(*(track.present for track in tracks), strict=True)] or [0] * frames
    share = there.count(wanted) / frames
    found = len(tracks)
    count = found == wanted and share >= 0.75 and likeness > 0
    candidates = [_Candidate(*both) for both in zip(tracks, contact.apart(tracks), strict=True)]
    sharp = [c.misfit[1] for c in candidates if c.misfit is not None]
    likeness *= events.ramp(float(np.mean(sharp)), *_SMEAR) if sharp else 0.0
    # The score: a product over bodies, surroundings, count, camera and prompt.
    judged = _match(candidates, reading)
    alone = events.ramp(strange / frames, 0.5, 0.0) if strange < 2 else 0.4 * events.ramp(strange / frames, 1.0, 0.1)
    parts = [[b.colour, b.shape, b.steady, _motion(b)] for b in judged]
    score = float(np.prod([_kept(v) for row in parts for v in row])) ** (1 / wanted) * likeness
    score *= _kept(alone) * (events.ramp(share, 0.0, 1.0) if count else _FLOOR)
    filmed = None if film is None else min(events.ramp(film, *_FILM), events.ramp(film, 2.2, 1.6))
    score *= 1.0 if filmed is None else _kept(filmed)
    readable = all(clause.readable for clause in reading.clauses)
    score *= 1.0 if readable else _UNREADABLE
    # The verdicts.
    colour, shape = all(b.colour >= 0.5 for b in judged), all(b.shape >= 0.5 for b in judged)
    direction, event = _all([b.direction for b in judged]), _all([b.event for b in judged])
    same = alone >= 0.5 and all(b.steady >= 0.5 for b in judged)
    right = count and colour and shape and same and direction is not False and event is not False
    right = right and readable and (filmed is None or filmed >= 0.5)
    return Report(
        score=score,
        world=likeness,
        count=count,
        colour=colour,
        shape=shape,
        direction=direction,
        event=event,
        all_right=right and likeness >= 0.5,
        found_count=found,
        bodies=judged,
        steady=same,
        strange=strange,
        camera=None if filmed is None else filmed >= 0.5,
        clauses=reading.clauses,
    )


def _motion(body: BodyReport) -> float:
    """Return the value of a body's motion; the right direction alone earns a part of it."""
    if body.event is None:
        return 1.0
    return (
        body.event if body.direction is None else 0.75 * body.event + 0.25 * min(body.direction, 2 * body.event + 0.2)
    )


def _kept(value: float) -> float:
    """Return the factor of the score for a value."""
    return _FLOOR + (1 - _FLOOR) * value


def _all(values: list[float | None]) -> bool | None:
    judged = [v for v in values if v is not None]
    return all(v >= 0.5 for v in judged) if judged else None


def _match(found: list[_Candidate], reading: Reading) -> tuple[BodyReport, ...]:
    """Assign found bodies to requested ones so that as much as possible is right; colour has the largest weight."""
    scene = reading.scene
    found = sorted(found, key=lambda c: -len(c.track.visible))[:5]
    slots: list[_Candidate | None] = [*found, *[None] * max(0, len(scene.bodies) - len(found))]
    looks = [[_looks(one, body.colour, body.shape) for one in slots] for body in scene.bodies]

    @cache
    def event(b: int, own: int, partner: int | None) -> float:
        return _event_value(reading, b, slots[own], None if partner is None else slots[partner]) or 0.0

    best: tuple[float, tuple[int, ...]] = (-1.0, ())
    for choice in itertools.permutations(range(len(slots)), len(scene.bodies)):
        value = sum(2 * looks[b][t][0] + looks[b][t][1] for b, t in enumerate(choice))
        partners = (None if body.partner is None else choice[body.partner] for body in scene.bodies)
        value += 0.1 * sum(event(b, t, partner) for (b, t), partner in zip(enumerate(choice), partners, strict=True))
        if value > best[0]:
            best = value, choice
    chosen = [slots[t] for t in best[1]]
    return tuple(_body_report(reading, b, chosen) for b in range(len(chosen)))


def _looks(found: _Candidate | None, colour: str, shape: str) -> tuple[float, float]:
    return (0.0, 0.0) if found is None else (found.colour(colour), found.shapes[shape])


def _misfit(track: Track) -> tuple[list[float], float, list[float]] | None:
    """Return medians over the frames with a clean outline: misfit with each shape, sharpness of the rim, oddness.

    If fewer than two frames are clean, use the third of the frames in which most of the body is visible.
    """
    least = 0.5 * events.large([p.area for p in track.pieces if p is not None])
    seen = [p for f in track.clean if (p := track.pieces[f]) is not None and p.area >= least]
    outlines = [(p.misfit, p.sharp, p.odd) for p in seen if p.misfit is not None and p.odd is not None]
    if len(outlines) < 2:
        seen = sorted((p for p in track.pieces if p is not None and p.misfit is not None), key=lambda p: -p.area)
        best = seen[: max(1, len(seen) // 3)]
        # A part of a body may have any outline, so oddness does not count here.
        outlines = [(p.misfit, p.sharp, (-1.0, -1.0, -1.0)) for p in best if p.misfit is not None]
    if not outlines:
        return None
    misfits, sharp, odd = zip(*outlines, strict=True)
    middle = [median(values) for values in zip(*misfits, strict=True)]
    return middle, median(sharp), [median(values) for values in zip(*odd, strict=True)]


def _shape_value(misfits: list[float], sharp: float, odd: list[float], shape: str) -> float:
    """Return how certainly a body with these misfits, this sharpness and this oddness has a shape, in [0,1]."""
    index = SHAPES.index(shape)
    own = misfits[index]
    other = min(m for m, name in zip(misfits, SHAPES, strict=True) if name != shape)
    return min(
        events.ramp(other - own, -_SURE, _SURE),
        events.ramp(own, *_MISFIT[index]),
        events.ramp(odd[index], *_ODD[index]),
        events.ramp(sharp, *_SHARP),
    )


def _event_value(reading: Reading, index: int, found: _Candidate | None, other: _Candidate | None) -> float | None:
    """Return the value of the event of a body; `other` is its partner.

    The value is None for a camera that moves, and for the partner in a collision.
    """
    scene, body = reading.scene, reading.scene.bodies[index]
    hit = any(b.partner == index and b.event == "collides" for b in scene.bodies)
    if scene.camera != "static" or hit:
        return None
    if found is None:
        return 0.0
    if body.partner is None:
        value = found.alone[body.event]
    else:
        value = 0.0 if other is None else found.beside(body.event, other)
    return min(
        value, events.place(found.track, reading.places[index]), events.heads(found.track, reading.headings[index])
    )


def _body_report(reading: Reading, index: int, chosen: list[_Candidate | None]) -> BodyReport:
    scene = reading.scene
    body, found = scene.bodies[index], chosen[index]
    asked = body.event in _MOVES and scene.camera == "static"
    event = _event_value(reading, index, found, None if body.partner is None else chosen[body.partner])
    if found is None:
        return BodyReport(colour=0.0, shape=0.0, event=event, direction=0.0 if asked else None)
    colour, shape = _looks(found, body.colour, body.shape)
    others = [other for other in chosen if other is not None and other is not found]
    return BodyReport(
        colour=colour,
        shape=shape,
        event=event,
        direction=max(events.heading(way, body.event) for way in found.ways) if asked else None,
        steady=found.steady,
        found_colour=list(COLOURS)[found.track.colour],
        found_shape=max(SHAPES, key=found.shapes.__getitem__) if found.misfit is not None else None,
        found_event=_found_event(found, others) if scene.camera == "static" else None,
        track=tuple(None if p is None else (p.x, p.y, p.area) for p in found.track.pieces),
    )


def _found_event(found: _Candidate, others: list[_Candidate]) -> str | None:
    """Return the event that a body shows, or None if no event is certain enough."""
    ranked = dict(found.alone)
    for name in PAIR if others else ():
        ranked[name] = max(0.0, *(found.beside(name, other) for other in others))
    # An event with another body is more specific than the body's own trajectory.
    top = max(ranked, key=lambda name: (name in PAIR and ranked[name] >= 0.5, ranked[name]))
    return top if ranked[top] >= 0.5 else None
