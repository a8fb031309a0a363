"""Blobs to bodies: pieces of one colour followed through the frames, whatever passes in front."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

#: Area of the smallest body as a part of the picture, and the share of the frames that make it one.
BODY_AREA = 0.004
_PERSISTENT = 0.2
_MOST_PER_COLOUR = 3
#: Longest way of a body from a frame to the next in picture widths; the fastest fall of the world makes 0.08.
JUMP = 0.11


@dataclass(slots=True)
class Piece:
    """One body in one frame: centroid and box in picture sizes, area as a part of the picture."""

    x: float
    y: float
    area: float
    box: tuple[float, float, float, float]
    touch: bool
    border: bool
    whole: bool
    sharp: float
    #: Misfit with every shape (in the order of `spec.SHAPES`), or None where the outline is not clean.
    misfit: tuple[float, ...] | None
    group: int


@dataclass(slots=True)
class Track:
    """A body through a clip of F frames; `pieces` has one entry a frame, None where it is not seen."""

    colour: int
    pieces: list[Piece | None]
    #: Colour in each frame, -1 where it is not seen.
    colours: list[int]
    #: Frames in which it is not seen but a body in front, or the picture's edge, explains that.
    hidden: list[bool] = field(default_factory=list)

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Whether it is seen, per frame."""
        return np.array([p is not None for p in self.pieces])

    def visible(self) -> list[int]:
        """Frames where it is seen."""
        return [f for f, p in enumerate(self.pieces) if p is not None]

    def clean(self) -> list[int]:
        """Frames where its whole outline is seen: nothing near it, not cut by the picture's edge."""
        return [f for f, p in enumerate(self.pieces) if p is not None and p.whole and not (p.touch or p.border)]


def follow(frames: Sequence[dict[int, list[Piece]]]) -> list[Track]:
    """Bodies of a clip from the pieces of each colour in each frame (the largest first)."""
    tracks = []
    for colour in sorted({c for frame in frames for c in frame}):
        tracks += _one_colour(colour, [frame.get(colour, []) for frame in frames])
    tracks = _join_recoloured(tracks)
    for track in tracks:
        track.hidden = _explained(track)
    return tracks


def _one_colour(colour: int, frames: list[list[Piece]]) -> list[Track]:
    largest = [f[0].area for f in frames if f and f[0].area >= BODY_AREA]
    if not largest:
        return []
    least = max(0.25 * float(np.median(largest)), 0.5 * BODY_AREA)
    main = [[p for i, p in enumerate(f) if p.area >= least or (i == 0 and p.touch)] for f in frames]
    count = len(frames)
    slots = 0
    while slots < _MOST_PER_COLOUR and sum(len(f) > slots for f in main) >= _PERSISTENT * count:
        slots += 1
    tracks = [Track(colour, [None] * count, [-1] * count) for _ in range(slots)]
    last: list[Piece | None] = [None] * slots
    for number, pieces in enumerate(main):
        for slot, piece in _assign(last, pieces[:slots]):
            tracks[slot].pieces[number] = last[slot] = piece
            tracks[slot].colours[number] = colour
    return tracks


def _assign(last: list[Piece | None], pieces: list[Piece]) -> list[tuple[int, Piece]]:
    """Pieces to slots with the least way in all; a slot that is still empty costs nothing but comes last."""
    best: tuple[float, tuple[int, ...]] | None = None
    for order in itertools.permutations(range(len(last)), len(pieces)):
        cost = 0.0
        for slot, piece in zip(order, pieces, strict=True):
            old = last[slot]
            cost += 0.5 + 0.001 * slot if old is None else math.hypot(piece.x - old.x, piece.y - old.y)
        if best is None or cost < best[0]:
            best = cost, order
    return list(zip(best[1], pieces, strict=True)) if best else []


def _join_recoloured(tracks: list[Track]) -> list[Track]:
    """A body that changes its colour on its way is one body: join tracks that follow each other in time and place."""
    tracks = list(tracks)
    joined = True
    while joined:
        joined = False
        for one, two in itertools.permutations(tracks, 2):
            if _continues(one, two):
                for f, piece in enumerate(two.pieces):
                    if one.pieces[f] is None and piece is not None:
                        one.pieces[f], one.colours[f] = piece, two.colours[f]
                tracks = [t for t in tracks if t is not two]
                joined = True
                break
    for track in tracks:
        values, counts = np.unique([c for c in track.colours if c >= 0], return_counts=True)
        track.colour = int(values[counts.argmax()])
    return tracks


def _continues(one: Track, two: Track) -> bool:
    first, second = one.seen, two.seen
    if (first & second).sum() > 0.1 * len(first):
        return False
    near = steps = 0
    for f in range(1, len(first)):
        for a, b in ((one, two), (two, one)):
            old, new = a.pieces[f - 1], b.pieces[f]
            if old is not None and new is not None and a.pieces[f] is None and b.pieces[f - 1] is None:
                steps += 1
                near += math.hypot(new.x - old.x, new.y - old.y) < JUMP
    return steps > 0 and near >= 0.5 * steps


def _explained(track: Track) -> list[bool]:
    """A gap is explained when the body is cut off by another one before and after it, or has left over the edge."""
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
