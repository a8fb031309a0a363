"""Free flight: whether a falling, thrown or bouncing body moves on parabolas that share one gravity.

Between two contacts, x is linear and y is quadratic in time, and y curves downwards. The frames of a clip are equally
spaced in time, so no frame rate is needed. Under gravity a body is never at its lowest point in the middle of a
flight. The lowest points of a track are therefore its contacts, and they split the track into flights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.polynomial import polynomial
from numpy.typing import NDArray

from postgen.rewards.base import Clip, prompted_by, streaming
from postgen.rewards.world import NO_BODY, alike, reports_of, scenes, why_not
from postgen.world import Spec

Array = NDArray[np.floating[Any]]

_LEAST = 4
"""Fewest frames of a flight that is scored; three are not enough, because a parabola fits any three points."""
_REST = 0.08
"""A body at the end of a clip is at rest within this part of the height of its flights."""
_SWING = 0.1
"""After a contact a track must rise by at least this part of the height of the flights."""
_FLYING = ("falls", "bounces")


@streaming
@prompted_by("track", "spec")
def parabola(
    prompts: Sequence[str],
    completions: Sequence[Clip],
    *,
    track: Sequence[Any] | None = None,
    spec: Sequence[Spec | Mapping[str, Any] | None] | None = None,
    log_reasons: Any = None,
) -> list[float | None]:
    """Score the flights of clips with `flight_score`; the worst body of a clip counts.

    Args:
        prompts: parsed with `world.parse` if there is neither a track nor a spec.
        completions: clips (F,3,H,W) in [0,1] of the synthetic world; unused for clips with a track.
        track: column of tracks, (F,2) of x right and y down in any unit, NaN where the body is not visible.
        spec: column of scenes, as `Spec` or in its JSON form.
        log_reasons: receives the reasons of missing scores.

    Returns:
        One score in [0,1] per clip, 0 if nothing flies; None if the scene has no falling or bouncing body.
    """
    scores: list[float | None] = [None] * len(completions)
    given = track if track is not None else [None] * len(completions)
    asked_for = scenes(prompts, spec)
    wanted = [scene if _flyers(scene) else None for scene in asked_for]
    for row, points in enumerate(given):
        if points is not None:
            scores[row] = flight_score(np.asarray(points, dtype=np.float64))
    for rows in alike(completions, [w is not None and t is None for w, t in zip(wanted, given, strict=True)]):
        asked = [scene for row in rows if (scene := wanted[row]) is not None]
        reports = reports_of([completions[row] for row in rows], asked)
        for row, scene, report in zip(rows, asked, reports, strict=True):
            scores[row] = min(flight_score(_points(report.bodies[body].track)) for body in _flyers(scene))
    if log_reasons is not None:
        log_reasons([_why_not(*row) for row in zip(completions, asked_for, given, strict=True)])
    return scores


def _why_not(clip: Clip, scene: Spec | None, track: Any) -> str | None:
    if track is not None:
        return None
    if scene is None:
        return NO_BODY
    if not _flyers(scene):
        return "its scene has no falling or bouncing body before a static camera"
    return why_not(clip, True)


def _flyers(scene: Spec | None) -> list[int]:
    if scene is None or scene.camera != "static":
        return []
    return [index for index, body in enumerate(scene.bodies) if body.event in _FLYING]


def _points(track: Sequence[tuple[float, float, float] | None]) -> Array:
    return np.array([(np.nan, np.nan) if p is None else p[:2] for p in track], dtype=np.float64).reshape(-1, 2)


def flight_score(track_F2: Array) -> float:
    """Score one track (x right, y down): 1 for parabolas of one gravity, down to 0 for any other motion.

    The score is the minimum of five values: the distance of the track from the best parabolas (root mean square,
    relative to the height of the flights: 0.02 is good, 0.08 is bad); how curved the parabolas are (a fall at constant
    speed is not curved); how equal their gravities are; whether each flight starts where the one before ended; and the
    share of the frames in the air that belong to flights long enough to be scored.

    >>> t = np.arange(12.0)
    >>> flight_score(np.stack((t, 0.1 * (t - 5) ** 2), 1))
    1.0
    >>> flight_score(np.stack((t, t), 1))
    0.0
    """
    time = np.flatnonzero(np.isfinite(track_F2).all(1)).astype(np.float64)
    points = track_F2[time.astype(int)]
    if len(time) < _LEAST or np.ptp(points[:, 1]) == 0:
        return 0.0
    # Split the track into flights, and fit a parabola to each flight that is long enough.
    flights, airborne = _flights(time, points[:, 1])
    judged = [f for f in flights if len(f) >= _LEAST]
    if not judged:
        return 0.0
    arcs = [_fit(time[f], points[f]) for f in judged]
    lengths = np.array([len(f) for f in judged], dtype=np.float64)
    # Measure errors and gaps relative to the height of the highest flight.
    height = max(float(np.ptp(points[f, 1])) for f in judged) or 1.0
    error = np.sqrt(sum(arc.error for arc in arcs) / lengths.sum()) / height
    gravity = np.array([arc.y[2] for arc in arcs])
    mean = float(np.average(gravity, weights=lengths))
    spread = np.sqrt(np.average((gravity - mean) ** 2, weights=lengths)) / max(mean, 1e-12)
    # Height of the arc above its chord, relative to the height: 1/4 for a fall from rest, 1 for a throw.
    bend = max(mean * float(np.ptp(time[f])) ** 2 / 4 for f in judged) / height
    gap = max((_gap(a, b) for a, b in pairwise(arcs)), default=0.0) / height
    return min(
        _ramp(float(error), 0.08, 0.02),
        _ramp(bend, 0.05, 0.15),
        _ramp(float(spread), 0.8, 0.3),
        _ramp(gap, 0.3, 0.1),
        _ramp(float(lengths.sum()) / max(airborne, 1), 0.3, 0.7),
    )


def _ramp(value: float, low: float, high: float) -> float:
    """0 at `low`, 1 at `high`, linear between (either may be the larger one)."""
    return float(np.clip((value - low) / (high - low), 0.0, 1.0))


def _flights(time: Array, y: Array) -> tuple[list[NDArray[np.intp]], int]:
    """Return the frames of each flight without the contacts, and the number of frames in the air."""
    span = float(np.ptp(y))
    resting = y >= y.max() - _REST * span
    end = len(y)
    while end > 1 and resting[end - 1] and resting[end - 2]:
        end -= 1
    contacts = [f for f in _lowest(y[:end], _SWING * span) if f > 0]
    if end < len(y):
        contacts.append(end - 1)
    bounds = [-1, *sorted(set(contacts)), end]
    return [np.arange(a + 1, b) for a, b in pairwise(bounds)], end - len(contacts)


def _lowest(y: Array, swing: float) -> list[int]:
    """Return the frames of contact: y is largest there, and rises and falls by at least `swing` around them."""
    found: list[int] = []
    least, high = float(y[0]), -1
    for frame, value in enumerate(y):
        if high < 0:
            least = min(least, float(value))
            high = frame if value - least >= swing else -1
        elif value > y[high]:
            high = frame
        elif y[high] - value >= swing:
            found.append(high)
            least, high = float(value), -1
    return found


class _Arc(NamedTuple):
    """The best parabola of a flight: polynomials in time, and its squared distance from the flight."""

    x: Array
    y: Array
    first: float
    last: float
    error: float

    def at(self, time: Array) -> Array:
        """Return the positions (n,2) at times (n,)."""
        return np.stack((polynomial.polyval(time, self.x), polynomial.polyval(time, self.y)), 1)


def _fit(time: Array, points: Array) -> _Arc:
    x, y = polynomial.polyfit(time, points[:, 0], 1), polynomial.polyfit(time, points[:, 1], 2)
    arc = _Arc(x, y, float(time[0]), float(time[-1]), 0.0)
    return arc._replace(error=float(((points - arc.at(time)) ** 2).sum()))


def _gap(before: _Arc, after: _Arc) -> float:
    """Return the least distance of two parabolas between the last frame of one flight and the first of the next."""
    time = np.linspace(before.last, after.first, 17)
    return float(np.hypot(*(before.at(time) - after.at(time)).T).min())
