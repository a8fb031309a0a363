"""Whether two bodies stay separate where they meet in the picture: the front body must show its whole outline.

If a model lets two bodies melt into each other, neither outline is whole. The test takes, of every connected group of
bodies, the body whose outline is least damaged. So it does not matter which body is in front, or whether the bodies
only touch.
"""

from __future__ import annotations

from statistics import median

from postgen.world.check.events import ramp
from postgen.world.check.pieces import Piece
from postgen.world.check.steady import whole
from postgen.world.check.tracks import Track

#: Ends of the ramp over the additional misfit of the front body's outline, compared with the same body alone: a melt,
#: a clean contact. In the clips that people judged by eye, right clips lie below 0.025 with one exception (0.056);
#: melts start at 0.026.
_MELT = (0.043, 0.021)


def apart(tracks: list[Track]) -> list[float]:
    """Return one value per body: 1 if it never melts into another body, below 0.5 if it does; values as in `events`.

    The worst frame counts, as a melt often lasts for only one or two frames.
    """
    usual = [_usual(track) for track in tracks]
    spoilt: list[list[float]] = [[0.0] for _ in tracks]
    for frame in range(len(tracks[0].pieces) if tracks else 0):
        groups: dict[int, list[int]] = {}
        for k, track in enumerate(tracks):
            piece = track.pieces[frame]
            if piece is not None and piece.touch:
                groups.setdefault(piece.group, []).append(k)
        for members in groups.values():
            seen = [_beyond(tracks[k].pieces[frame], usual[k]) for k in members]
            known = [value for value in seen if value is not None]
            if len(members) > 1 and len(known) == len(members):
                for k in members:
                    spoilt[k].append(min(known))
        _covering(tracks, usual, frame, spoilt)
    return [ramp(max(values), *_MELT) for values in spoilt]


def _covering(
    tracks: list[Track], usual: list[tuple[int, float] | None], frame: int, spoilt: list[list[float]]
) -> None:
    """Add the damage of the front body where one of two bodies is hidden completely by the other one."""
    for k, track in enumerate(tracks):
        front = tracks[1 - k].pieces[frame] if len(tracks) == 2 else None
        if track.pieces[frame] is None and any(track.hidden[frame : frame + 1]) and front and not front.touch:
            value = _beyond(front, usual[1 - k]) or 0.0
            spoilt[k].append(value)
            spoilt[1 - k].append(value)


def _usual(track: Track) -> tuple[int, float] | None:
    """Return the shape that best fits a body while it stands alone, and its misfit; None if it rarely stands alone."""
    rows = [p.misfit for p in whole(track).values() if p.misfit is not None]
    if len(rows) < 3:
        return None
    middle = [median(values) for values in zip(*rows, strict=True)]
    return middle.index(min(middle)), min(middle)


def _beyond(piece: Piece | None, usual: tuple[int, float] | None) -> float | None:
    """Return how much a piece's misfit exceeds that of its body alone; None if either is unknown."""
    if piece is None or usual is None or piece.misfit is None or piece.border or piece.merged:
        return None
    return max(0.0, piece.misfit[usual[0]] - usual[1])
