"""What a clip shows against what was asked for: the part of the judge that is plain Python, of one clip at a time.

Nothing here imports torch, so that a process of `workers` starts fast and stays small.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from postgen.world.check import events
from postgen.world.check.pieces import pieces
from postgen.world.check.tracks import Track, follow
from postgen.world.spec import COLOURS, SHAPES, Spec

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

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` reads it back, floats to the last digit."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Read the JSON form of `to_dict`."""
        bodies = tuple(
            BodyReport(**{**body, "track": tuple(None if place is None else tuple(place) for place in body["track"])})
            for body in data["bodies"]
        )
        return cls(**{**data, "bodies": bodies})


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What the device saw in B clips of F pictures: N blobs, with C values each.

    `rows_NC` float64, the blobs of one picture after those of another, columns as `pieces.COLUMNS`; `count_BF` of each
    picture; `height` and `width` of all pictures; `likeness` how much each clip looks like the world, in [0,1].
    """

    rows_NC: NDArray[np.float64]
    count_BF: NDArray[np.int64]
    height: int
    width: int
    likeness: list[float]

    def __len__(self) -> int:
        return len(self.likeness)

    def part(self, low: int, high: int) -> Sight:
        """Return clips low to high - 1."""
        start, stop = (int(self.count_BF[:clip].sum()) for clip in (low, high))
        rows, likeness = self.rows_NC[start:stop], self.likeness[low:high]
        return replace(self, rows_NC=rows, count_BF=self.count_BF[low:high], likeness=likeness)

    def tracks(self) -> Iterator[list[Track]]:
        """Yield the bodies of each clip."""
        rows = iter(self.rows_NC.tolist())
        for counts in self.count_BF.tolist():
            yield follow([pieces(list(itertools.islice(rows, count)), self.height, self.width) for count in counts])


def judge(sight: Sight, scenes: Sequence[Spec]) -> list[Report]:
    """Judge clips against one scene each."""
    frames = sight.count_BF.shape[1]
    return [
        _report(tracks, scene, likeness, frames)
        for tracks, scene, likeness in zip(sight.tracks(), scenes, sight.likeness, strict=True)
    ]


class _Candidate:
    """A body that was found, and what is asked of it again and again."""

    def __init__(self, track: Track) -> None:
        self.track = track
        self.ways = events.ways(track)
        self.misfit = _misfit(track)
        self._pairs: dict[tuple[str, int], float] = {}

    @cached_property
    def alone(self) -> dict[str, float]:
        """Value of each event of one body."""
        return {name: max(map(value, self.ways)) for name, value in events.SINGLE.items()}

    def beside(self, event: str, other: _Candidate) -> float:
        """Value of an event of two bodies, the other one its partner."""
        key = (event, id(other))
        if key not in self._pairs:
            self._pairs[key] = events.PAIR[event](self.track, other.track)
        return self._pairs[key]

    def colour(self, name: str) -> float:
        """How surely it has a colour, in [0,1]."""
        seen = [c for c in self.track.colours if c >= 0]
        return events.ramp(seen.count(list(COLOURS).index(name)) / len(seen), 0.5, 1.0)

    @cached_property
    def shapes(self) -> dict[str, float]:
        """How surely it has each shape, in [0,1]."""
        return {shape: 0.0 if self.misfit is None else _shape_value(*self.misfit, shape) for shape in SHAPES}


def _report(tracks: list[Track], scene: Spec, likeness: float, frames: int) -> Report:
    wanted = len(scene.bodies)
    there = [sum(present) for present in zip(*(track.present for track in tracks), strict=True)] or [0] * frames
    share = there.count(wanted) / frames
    found = len(tracks)
    count = found == wanted and share >= 0.75 and likeness > 0
    candidates = [_Candidate(track) for track in tracks]
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
    found = sorted(found, key=lambda c: -len(c.track.visible))[:5]
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
    return (0.0, 0.0) if found is None else (found.colour(colour), found.shapes[shape])


def _misfit(track: Track) -> tuple[list[float], float] | None:
    """Median misfit with every shape over the frames with a clean outline, and the median sharpness of the rim.

    Without two clean frames, the third of the frames in which most of the body is seen.
    """
    seen = [p for f in track.clean if (p := track.pieces[f]) is not None]
    outlines = [(p.misfit, p.sharp) for p in seen if p.misfit is not None]
    if len(outlines) < 2:
        seen = sorted((p for p in track.pieces if p is not None and p.misfit is not None), key=lambda p: -p.area)
        outlines = [(p.misfit, p.sharp) for p in seen[: max(1, len(seen) // 3)] if p.misfit is not None]
    if not outlines:
        return None
    misfits, sharp = zip(*outlines, strict=True)
    return [median(values) for values in zip(*misfits, strict=True)], median(sharp)


def _shape_value(misfits: list[float], sharp: float, shape: str) -> float:
    """How surely a body with these misfits and this rim has a shape, in [0,1]."""
    own = misfits[SHAPES.index(shape)]
    other = min(m for m, name in zip(misfits, SHAPES, strict=True) if name != shape)
    return min(
        events.ramp(other - own, -_SURE, _SURE),
        events.ramp(own, _NO_SHAPE * 1.5, _NO_SHAPE * 0.5),
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
        return found.alone[body.event]
    return 0.0 if other is None else found.beside(body.event, other)


def _body_report(scene: Spec, index: int, chosen: list[_Candidate | None]) -> BodyReport:
    body, found = scene.bodies[index], chosen[index]
    asked = body.event in _MOVES and scene.camera == "static"
    event = _event_value(scene, index, found, None if body.partner is None else chosen[body.partner])
    if found is None:
        return BodyReport(colour=0.0, shape=0.0, event=event, direction=0.0 if asked else None)
    colour, shape = _looks(found, body.colour, body.shape)
    others = [other for other in chosen if other is not None and other is not found]
    return BodyReport(
        colour=colour,
        shape=shape,
        event=event,
        direction=max(events.heading(way, body.event) for way in found.ways) if asked else None,
        found_colour=list(COLOURS)[found.track.colour],
        found_shape=max(SHAPES, key=found.shapes.__getitem__) if found.misfit is not None else None,
        found_event=_found_event(found, others) if scene.camera == "static" else None,
        track=tuple(None if p is None else (p.x, p.y, p.area) for p in found.track.pieces),
    )


def _found_event(found: _Candidate, others: list[_Candidate]) -> str | None:
    """What a body does, as far as it can be told."""
    ranked = dict(found.alone)
    for name in events.PAIR if others else ():
        ranked[name] = max(0.0, *(found.beside(name, other) for other in others))
    # What a body does with another one says more than its own way does.
    top = max(ranked, key=lambda name: (name in events.PAIR and ranked[name] >= 0.5, ranked[name]))
    return top if ranked[top] >= 0.5 else None
