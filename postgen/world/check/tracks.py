"""From blobs to bodies: pieces of one colour are tracked through the frames, even if other bodies cover them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median

from postgen.world.check.pieces import Piece

#: Area of the smallest body relative to the picture; below, the share of frames that a body needs, and a second one of
#: its colour.
BODY_AREA = 0.004
_PERSISTENT, _SECOND = 0.2, 0.1
_MOST_PER_COLOUR = 3
#: Largest move of a body per frame in picture widths; the fastest fall of the world makes 0.08.
JUMP = 0.11


@dataclass
class Track:
    """A body through a clip of F frames; `pieces` has one entry per frame, None where the body is not visible."""

    colour: int
    pieces: list[Piece | None]
    #: Colour in each frame, -1 where the body is not visible.
    colours: list[int]
    #: True for frames in which the body is not visible because a body in front, or the picture's edge, hides it.
    hidden: list[bool] = field(default_factory=list)
    #: How far the body's own shadow extends below it in each frame, in picture heights; None if no such shadow is
    #: visible.
    shade: list[float | None] = field(default_factory=list)

    @cached_property
    def visible(self) -> list[int]:
        """Frames in which the body is visible."""
        return [f for f, p in enumerate(self.pieces) if p is not None]

    @cached_property
    def clean(self) -> list[int]:
        """Frames that show its whole outline: nothing touches the body, and the picture's edge does not cut it."""
        return [
            f for f, p in enumerate(self.pieces) if p is not None and p.whole and not (p.touch or p.border or p.merged)
        ]

    @property
    def present(self) -> list[bool]:
        """Whether the body is present, visible or hidden, in each frame."""
        hidden = self.hidden or [False] * len(self.pieces)
        return [p is not None or h for p, h in zip(self.pieces, hidden, strict=True)]

    @cached_property
    def step(self) -> float:
        """Largest move between consecutive visible frames, relative to the allowed move."""
        return self.leap(self.visible)

    def leap(self, frames: list[int]) -> float:
        """Return the largest move per frame among the given frames, relative to the allowed move; above 1: too far."""
        points = [(f, p.x, p.y) for f in frames if (p := self.pieces[f]) is not None]
        steps = [math.hypot(b[1] - a[1], b[2] - a[2]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
        return max(steps, default=0.0) / JUMP


def follow(frames: Sequence[dict[int, list[Piece]]]) -> list[Track]:
    """Return the bodies of a clip from the pieces of each colour in each frame, the largest piece first."""
    tracks = []
    for colour in sorted({c for frame in frames for c in frame}):
        tracks += _one_colour(colour, [frame.get(colour, []) for frame in frames])
    tracks = _join_recoloured(tracks)
    for track in tracks:
        track.hidden = [a or b for a, b in zip(track.hidden, _explained(track), strict=True)]
    return tracks


def _one_colour(colour: int, frames: list[list[Piece]]) -> list[Track]:
    largest = [f[0].area for f in frames if f and f[0].area >= BODY_AREA]
    if not largest:
        return []
    least = max(0.25 * median(largest), 0.5 * BODY_AREA)
    main = [[p for i, p in enumerate(f) if p.area >= least or (i == 0 and p.touch)] for f in frames]
    count = len(frames)
    slots, least_share = 0, _PERSISTENT
    while slots < _MOST_PER_COLOUR and sum(len(f) > slots for f in main) >= least_share * count:
        # A second body of the same colour may be hidden by the first one most of the time, so it needs fewer frames.
        slots, least_share = slots + 1, _SECOND
    tracks = [Track(colour, [None] * count, [-1] * count) for _ in range(slots)]
    for track in tracks:
        track.hidden = [False] * count
    last: list[Piece | None] = [None] * slots
    for number, pieces in enumerate(main):
        for slot, piece in _assign(last, pieces[:slots]):
            tracks[slot].pieces[number] = last[slot] = piece
            tracks[slot].colours[number] = colour
        _merge(tracks, last, number)
    return tracks


def _merge(tracks: list[Track], last: list[Piece | None], number: int) -> None:
    """Mark bodies that are hidden behind a body of their own colour.

    Two such bodies form one piece: the body without a piece is hidden, and the piece of the other one is merged.
    """
    for track, old in zip(tracks, last, strict=True):
        if track.pieces[number] is not None or old is None:
            continue
        for other in tracks:
            piece = other.pieces[number]
            if piece is not None and ((number and track.hidden[number - 1]) or _within(old, piece)):
                track.hidden[number] = piece.merged = True


def _within(one: Piece, other: Piece) -> bool:
    """Return whether the centre of `one` lies in the box of `other`, or at most 0.03 of the picture outside it."""
    x0, y0, x1, y1 = other.box
    return x0 - 0.03 <= one.x <= x1 + 0.03 and y0 - 0.03 <= one.y <= y1 + 0.03


def _assign(last: list[Piece | None], pieces: list[Piece]) -> list[tuple[int, Piece]]:
    """Assign pieces to slots such that the sum of the moves and the changes of size is smallest.

    An empty slot has a fixed cost, slightly higher for later slots.
    """
    best: tuple[float, tuple[int, ...]] | None = None
    for order in itertools.permutations(range(len(last)), len(pieces)):
        cost = 0.0
        for slot, piece in zip(order, pieces, strict=True):
            old = last[slot]
            if old is None:
                cost += 0.5 + 0.001 * slot
            else:
                cost += math.hypot(piece.x - old.x, piece.y - old.y) + 0.1 * abs(math.log(piece.area / old.area))
        if best is None or cost < best[0]:
            best = cost, order
    return list(zip(best[1], pieces, strict=True)) if best else []


def _join_recoloured(tracks: list[Track]) -> list[Track]:
    """Join tracks that continue each other in time and place.

    A body that changes its colour on its way is one body.
    """
    while pair := next((p for p in itertools.permutations(tracks, 2) if _continues(*p)), None):
        one, two = pair
        tracks = [_joined(one, two) if t is one else t for t in tracks if t is not two]
    for track in tracks:
        colours = [c for c in track.colours if c >= 0]
        track.colour = max(sorted(set(colours)), key=colours.count)
    return tracks


def bodies(tracks: list[Track]) -> list[Track]:
    """Return the tracks without seams: strips of mixed colour that touch larger bodies in all frames."""
    areas = [median([p.area for p in t.pieces if p is not None]) for t in tracks]
    top = max(areas, default=0.0)
    seams = [
        area < min(0.3 * top, 0.016) and all(p.touch for p in t.pieces if p is not None)
        for t, area in zip(tracks, areas, strict=True)
    ]
    return [t for t, seam in zip(tracks, seams, strict=True) if not seam]


def _joined(one: Track, two: Track) -> Track:
    """Return two tracks as one; the first one has priority where both are visible."""
    pairs = list(zip(one.pieces, two.pieces, one.colours, two.colours, strict=True))
    colours = [d if a is None and b is not None else c for a, b, c, d in pairs]
    hidden = [a or b for a, b in zip(one.hidden, two.hidden, strict=True)]
    return Track(one.colour, [b if a is None else a for a, b, _, _ in pairs], colours, hidden)


def _continues(one: Track, two: Track) -> bool:
    count = len(one.pieces)
    if len({*one.visible}.intersection(two.visible)) > 0.1 * count:
        return False
    near = steps = 0
    for f in range(1, count):
        for a, b in ((one.pieces, two.pieces), (two.pieces, one.pieces)):
            old, new = a[f - 1], b[f]
            if old is not None and new is not None and a[f] is None and b[f - 1] is None:
                steps += 1
                near += math.hypot(new.x - old.x, new.y - old.y) < JUMP
    return steps > 0 and near >= 0.5 * steps


def _explained(track: Track) -> list[bool]:
    """Return the frames in which a body is missing for a known reason.

    A gap is explained if another body touches the body before and after it, or if the body has left over the picture's
    edge.
    """
    count = len(track.pieces)
    hidden = [False] * count
    frame = 0
    while frame < count:
        if track.pieces[frame] is not None:
            frame += 1
            continue
        end = frame
        while end < count and track.pieces[end] is None:
            end += 1
        before = track.pieces[frame - 1] if frame else None
        after = track.pieces[end] if end < count else None
        behind = before is not None and after is not None and before.touch and after.touch
        left = before is not None and after is None and before.border
        for f in range(frame, end):
            hidden[f] = behind or left
        frame = end
    return hidden
