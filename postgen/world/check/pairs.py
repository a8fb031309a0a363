"""Events of two bodies. Every test returns a value in [0,1]; 0.5 or more means yes."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

from postgen.world.check.events import large, order, ramp, sign_of, spread, way
from postgen.world.check.tracks import Track


def collides(first: Track, second: Track) -> float:
    """Return whether the first body hits the second one.

    The first body approaches the second, which rests. Then the second moves on in the same direction, and the first
    does not pass through it.
    """
    both = [f for f in range(len(first.pieces)) if first.pieces[f] is not None and second.pieces[f] is not None]
    if len(both) < 6:
        return 0.0
    a, b = way(first, both), way(second, both)
    scale = _size(second, both) / _size(first, both)
    ax = [x / scale for x in a.x]
    sign = sign_of(b.x[0] - ax[0])
    start = next((i for i, x in enumerate(b.x) if sign * (x - b.x[0]) > 0.12), 0)
    if start < 2:
        return 0.0
    gaps = [_gap(first, second, f) for f in both]
    least = min(gaps[max(0, start - 2) : start + 2])
    # The body starts to move before its displacement is distinguishable from noise.
    onset = max(i for i in range(start) if sign * (b.x[i] - b.x[0]) <= 0.03) + 1
    contact = next(i for i, gap in enumerate(gaps) if gap <= max(least, min(gaps)) + 0.08)
    return min(
        ramp(sign * (ax[start - 1] - ax[0]), 0.0, 0.5),
        ramp(sign * order(ax[:start]) if start > 2 else 1.0, 0.5, 1.0),
        ramp(spread(b.x[:start]), 0.35, 0.05),
        ramp(least, 0.35, 0.12),
        ramp(abs(onset - contact) / max(1.0, (len(first.pieces) - 1) / 16), 5.0, 2.0),
        ramp(_onward(ax, start, sign), 1.05, 0.85),
        ramp(min(gaps), -1.0, -0.45),
        1.0 if sign * (b.x[-1] - ax[-1]) > 0 else 0.0,
        ramp(sign * b.dx, 0.0, 0.5),
        ramp(sign * order(b.x[start - 1 :]), 0.5, 0.9),
        min(ramp(a.step, 1.2, 0.8), ramp(b.step, 1.2, 0.8)),
        min(ramp(a.seen, 0.5, 0.8), ramp(b.seen, 0.5, 0.8)),
    )


def _onward(x: list[float], start: int, sign: float) -> float:
    """Return the speed of a body after a frame, divided by its speed before that frame."""
    before, after = x[max(0, start - 5) : start], x[start + 1 :]
    if len(before) < 2 or len(after) < 2:
        return 0.0
    first, then = ((v[-1] - v[0]) / (len(v) - 1) for v in (before, after))
    return sign * then / max(sign * first, 1e-6)


def _size(track: Track, frames: list[int]) -> float:
    return math.sqrt(median([p.area for f in frames if (p := track.pieces[f]) is not None]))


def _gap(first: Track, second: Track, frame: int) -> float:
    """Return the free space between two bodies along x, relative to their mean width; negative if they overlap.

    In the world, bodies touch at their contact circles; on each side, these exceed a cylinder by a quarter of its
    width.
    """
    a, b = first.pieces[frame], second.pieces[frame]
    if a is None or b is None:
        return 9.0
    left, right = (a, b) if a.x < b.x else (b, a)
    wide = [p.box[2] - p.box[0] for p in (left, right)]
    slack = sum(0.235 * w for w, p in zip(wide, (left, right), strict=True) if p.box[3] - p.box[1] > 1.35 * w)
    return (right.box[0] - left.box[2] - slack) / (0.5 * sum(wide))


def passes_behind(first: Track, second: Track) -> float:
    """Return whether the first body crosses behind the second one and is covered there, and the second never is."""
    front = [p.area for p in second.pieces if p is not None and not p.merged]
    if len(first.visible) < 2 or len(front) < 2:
        return 0.0
    side = [
        (a.x - b.x) / math.sqrt(b.area)
        for a, b in zip(first.pieces, second.pieces, strict=True)
        if a is not None and b is not None
    ]
    if not side:
        # The two are never visible together, as in a clip where one turns into the other.
        return 0.0
    w = way(first, first.visible)
    sign = sign_of(w.dx)
    areas = [0.0 if p is None else p.area for p in first.pieces]
    return min(
        ramp(sign * w.order_x, 0.6, 1.0),
        ramp(-sign * side[0], 0.0, 0.6),
        ramp(sign * side[-1], 0.0, 0.6),
        ramp(min(areas) / large([area for area in areas if area > 0]), 0.9, 0.4),
        ramp(min(front) / median(front), 0.82, 0.97),
        # Only clean frames count: slivers on both sides of the front body lie further apart than a body moves in a
        # frame.
        ramp(first.leap(first.clean), 1.2, 0.8),
        ramp(w.seen, 0.5, 0.9),
    )


#: Tests of the events of a body with a second one.
PAIR: dict[str, Callable[[Track, Track], float]] = {"collides": collides, "passes behind": passes_behind}
