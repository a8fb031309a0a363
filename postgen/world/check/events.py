"""Events of one body, from its trajectory in the picture. A test returns a value in [0,1]; 0.5 or more means yes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import median

import numpy as np

from postgen.world.check.tracks import Track


def ramp(value: float, low: float, high: float) -> float:
    """Return 0 at `low`, 1 at `high` and linear values between; `low` may be larger than `high`.

    Constants of the judge that are the ends of a ramp have this order: (low, high).
    """
    return min(max((value - low) / (high - low), 0.0), 1.0)


@dataclass
class Way:
    """Trajectory of a body in units of its own size (root of its area): x right, y down, s the log of its size.

    `count` is the number of frames of the clip. `step` is the largest move from a frame to the next, relative to the
    allowed one (above 1 the body jumped). `seen` is the share of frames in which the body is present. Quantities that
    several events need are cached.
    """

    x: list[float]
    y: list[float]
    s: list[float]
    count: int
    step: float
    seen: float
    #: Root of the body's area, relative to the picture.
    size: float = 0.2
    #: Largest second difference of x over consecutive frames, in units of the size.
    turn: float = 0.0
    #: How far the body's own shadow extends below it at the end and at its lowest position, in units of the size.
    end_shade: float = 0.0
    low_shade: float = 0.0

    @cached_property
    def dx(self) -> float:
        """Net move to the right."""
        return _net(self.x)

    @cached_property
    def dy(self) -> float:
        """Net move down."""
        return _net(self.y)

    @cached_property
    def ds(self) -> float:
        """Net growth (log)."""
        return _net(self.s)

    @cached_property
    def order_x(self) -> float:
        """How steadily the body moves to the right, in [-1,1]."""
        return order(self.x)

    @cached_property
    def order_s(self) -> float:
        """How steadily the body grows, in [-1,1]."""
        return order(self.s)

    @cached_property
    def steady(self) -> float:
        """1 for a body that is always present and never jumps."""
        return min(ramp(self.step, 1.2, 0.8), ramp(self.seen, 0.5, 0.9), ramp(self.turn, 0.5, 0.25))

    def runs(self, value: Sequence[float], sign: float) -> float:
        """Return in [0,1] whether a value changes in one direction all the time.

        The value is low if one step makes most of the change, or if the change goes back in between.
        """
        steps = [sign * (b - a) for a, b in pairwise(value)]
        total = sum(steps)
        if total <= 0:
            return 0.0
        back = sum(-step for step in steps if step < 0)
        # One of n equal steps is 1 / n of the change; a step across missing frames counts as one step too.
        most = max(0.35, 2.2 / len(steps))
        return min(ramp(back / total, 0.45, 0.15), ramp(max(steps) / total, most + 0.15, most))

    @property
    def needed(self) -> float:
        """Share of the full move that is required: less for a short clip and for a very large body."""
        return min(1.0, (self.count - 1) / 8, 0.27 / self.size)


def ways(track: Track) -> list[Way]:
    """Return the trajectory over several choices of frames, so that a test can use the best one.

    The choices are: all frames in which the body is visible; and those in which it is nearly whole, clean, or not
    merged, if there are enough of them. A body that passes in front moves the centroid of the visible part.
    """
    visible = track.visible
    least = 0.65 * large([p.area for p in track.pieces if p is not None])
    most = [f for f in visible if (p := track.pieces[f]) is not None and p.area >= least]
    single = [f for f in visible if (p := track.pieces[f]) is not None and not p.merged]
    choices = [visible]
    for frames, share in ((most, 0.4), (track.clean, 0.4), (single, 0.1)):
        if len(frames) >= share * len(track.pieces) and frames not in choices:
            choices.append(frames)
    return [way(track, frames) for frames in choices]


def way(track: Track, frames: list[int]) -> Way:
    """Return the trajectory of a track over the given frames; the body must be visible in each of them."""
    pieces = [p for p in (track.pieces[f] for f in frames) if p is not None]
    area = [p.area for p in pieces]
    size = math.sqrt(median(area))
    present = track.present
    x, y = [p.x / size for p in pieces], [p.y / size for p in pieces]
    return Way(
        x=x,
        y=y,
        s=(0.5 * np.log(area)).tolist(),
        count=len(track.pieces),
        step=track.step,
        seen=sum(present) / len(present),
        size=size,
        turn=_turn(frames, x),
        **_shades(track, size),
    )


def _turn(frames: list[int], x: list[float]) -> float:
    """Return the largest second difference of x over three consecutive frames."""
    rows = zip(frames, frames[2:], x, x[1:], x[2:], strict=False)
    return max((abs(a - 2 * b + c) for f, g, a, b, c in rows if g == f + 2), default=0.0)


def _shades(track: Track, size: float) -> dict[str, float]:
    """Return how far the shadow extends below the body, in the last frames and in the lowest frames.

    The values are 0 if no shadow is visible.
    """
    rows = [(p.y, s) for p, s in zip(track.pieces, track.shade, strict=False) if p is not None and s is not None]
    seen = [p.y for p in track.pieces if p is not None]
    if not rows or not seen:
        return {"end_shade": 0.0, "low_shade": 0.0}
    last = track.shade[-2:]
    end = min((0.0 if s is None else s) for s in last)
    low, high = max(seen), min(seen)
    deepest = [y for y in seen if y >= low - 0.08 * (low - high)]
    near = [s for y, s in rows if y >= low - 0.08 * (low - high)]
    # If a shadow is missing in one of the lowest frames, the body is on the ground there.
    least = 0.0 if len(near) < len(deepest) else min(near)
    return {"end_shade": end / size, "low_shade": least / size}


def large(values: Sequence[float]) -> float:
    """Return the 85th percentile, with linear interpolation."""
    ranked = sorted(values)
    place = 0.85 * (len(ranked) - 1)
    low = math.floor(place)
    if low + 1 >= len(ranked):
        return ranked[-1]
    part, gap = place - low, ranked[low + 1] - ranked[low]
    # Interpolated from the nearer neighbour, so that the result is exact at both.
    return ranked[low + 1] - gap * (1 - part) if part >= 0.5 else ranked[low] + gap * part


def _net(value: Sequence[float]) -> float:
    """Return the last value minus the first; with at least 9 values, the mean of two values at each end."""
    if len(value) < 9:
        return value[-1] - value[0]
    return (value[-2] + value[-1]) / 2 - (value[0] + value[1]) / 2


def order(value: Sequence[float]) -> float:
    """Return the rank correlation of values with time, in [-1,1]; equal values get the mean of their ranks.

    For two values, the result is the sign of their difference.
    """
    n = len(value)
    if n < 3:
        return sign_of(value[-1] - value[0]) if n == 2 else 0.0
    ranked = sorted(range(n), key=value.__getitem__)
    total, start = 0.0, 0
    while start < n:
        end = start
        while end + 1 < n and value[ranked[end + 1]] - value[ranked[start]] < 1e-6:
            end += 1
        middle = (start + end) / 2
        total += sum((middle - ranked[k]) ** 2 for k in range(start, end + 1))
        start = end + 1
    return 1.0 - 6.0 * total / (n * (n * n - 1))


def sign_of(value: float) -> float:
    """Return the sign of a number: -1, 0 or 1."""
    return float((value > 0) - (value < 0))


def spread(value: Sequence[float]) -> float:
    """Return the largest value minus the smallest."""
    return max(value) - min(value)


def moves(w: Way, sign: float) -> float:
    """Return whether the body moves right (sign 1) or left (-1) at constant distance and height."""
    far = w.needed * 0.55
    return min(
        ramp(sign * w.dx, 0.0, 2 * far),
        ramp(sign * w.order_x, 0.6, 1.0),
        w.runs(w.x, sign),
        ramp(abs(w.ds), 0.25, 0.05),
        ramp(abs(w.dy) / max(abs(w.dx), 1e-6), 0.9, 0.3),
        w.steady,
    )


def approaches(w: Way, sign: float) -> float:
    """Return whether the body comes closer (sign 1: it grows and moves down the picture) or moves away (-1)."""
    far = min(1.0, (w.count - 1) / 8) * 0.11
    return min(
        ramp(sign * w.ds, 0.0, 2 * far),
        ramp(sign * w.order_s, 0.6, 1.0),
        w.runs(w.s, sign),
        ramp(sign * w.dy, -0.1, 0.3),
        w.steady,
    )


def stays(w: Way) -> float:
    """Return whether the body stays where it is."""
    far = max(spread(w.x), spread(w.y))
    return min(ramp(far, 0.45, 0.05), ramp(spread(w.s), 0.25, 0.05), w.steady)


#: Ends of the ramp over the distance from a body down to the end of its shadow, in units of the body's size: above the
#: ground, on the ground.
_HANGING = (0.42, 0.18)


def falls(w: Way) -> float:
    """Return whether the body moves down, never up again, and rests on the ground at the end."""
    drop = max(w.y) - w.y[0]
    steps = np.diff(w.y)
    rise = float(np.maximum(-steps, 0.0).sum())
    last = abs(float(steps[-1])) if len(steps) else 1.0
    return min(
        ramp(drop, 0.0, 0.7 * max(0.5, w.needed)),
        ramp(rise / max(drop, 1e-6), 0.35, 0.05),
        ramp(last / max(float(steps.max(initial=0.0)), 1e-6), 0.8, 0.2),
        ramp(abs(w.dx) / max(drop, 1e-6), 0.7, 0.1),
        ramp(w.ds, 0.2, 0.04),
        ramp(w.end_shade, *_HANGING),
        w.steady,
    )


def bounces(w: Way) -> float:
    """Return whether the body moves down and up again at least once, and not more often than gravity allows."""
    height = spread(w.y)
    turns = _turns(w.y, 0.25 * height)
    down_first = len(turns) > 1 and turns[1] > turns[0]
    ups = sum(b < a for a, b in pairwise(turns))
    allowed = 2 + (w.count - 1) / 7
    return min(
        ramp(height, 0.0, 0.7),
        1.0 if ups >= 1 and (down_first or len(turns) > 2) else 0.0,
        ramp(len(turns) - 1, allowed + 1, allowed - 1),
        ramp(spread(w.x) / max(height, 1e-6), 1.2, 0.4),
        ramp(w.low_shade, *_HANGING),
        w.steady,
    )


def _turns(value: Sequence[float], least: float) -> list[float]:
    """Return the values at the turning points of a curve, including the first and the last value.

    Swings smaller than `least` do not count.
    """
    points, direction = [value[0]], 0
    for v in value[1:]:
        if direction and (v - points[-1]) * direction > 0:
            points[-1] = v
        elif abs(v - points[-1]) >= max(least, 1e-6):
            direction = 1 if v > points[-1] else -1
            points.append(v)
    return points


#: Events of one body.
SINGLE: dict[str, Callable[[Way], float]] = {
    "moves left": lambda w: moves(w, -1.0),
    "moves right": lambda w: moves(w, 1.0),
    "moves closer": lambda w: approaches(w, 1.0),
    "moves away": lambda w: approaches(w, -1.0),
    "stays": stays,
    "bounces": bounces,
    "falls": falls,
}


def place(track: Track, name: str | None) -> float:
    """Return whether a body is in the named part of the picture (left, middle, right) when it is first visible."""
    if name is None:
        return 1.0
    x = next(p.x for p in track.pieces if p is not None) - 0.5
    return ramp(abs(x), 0.26, 0.14) if name == "middle" else ramp(x if name == "right" else -x, 0.0, 0.1)


def heads(track: Track, side: str | None) -> float:
    """Return whether the net move of a body is towards the named side."""
    if side is None:
        return 1.0
    sign = 1.0 if side == "right" else -1.0
    return ramp(sign * max((w.dx for w in ways(track)), key=abs), 0.0, 0.4)


def heading(w: Way, event: str) -> float:
    """Return whether the net move has the requested direction, however far the body moves.

    This is the test `direction` of the four moves.
    """
    if event in ("moves left", "moves right"):
        sign = 1.0 if event == "moves right" else -1.0
        main = ramp(abs(w.dx) / max(abs(w.dy), 1e-6), 0.5, 1.5)
        return min(ramp(sign * w.dx, 0.0, 0.4 * w.needed), ramp(sign * w.order_x, 0.2, 1.0), main)
    sign = 1.0 if event == "moves closer" else -1.0
    return min(ramp(sign * w.ds, 0.0, 0.1 * w.needed), ramp(sign * w.order_s, 0.2, 1.0))
