"""Whether bodies stay apart where they meet in the picture: the one in front always shows all of its outline.

Where a model lets two bodies run into each other, neither is whole. Of every group that hangs together the body whose
outline is the least spoilt is taken, so it does not matter which one is in front, or whether they only touch.
"""

from __future__ import annotations

from statistics import median

from postgen.world.check.events import ramp
from postgen.world.check.pieces import Piece
from postgen.world.check.steady import whole
from postgen.world.check.tracks import Track

#: Misfit of the front body's outline beyond what it has when it stands alone: of a melt, and of a clean contact. Of
#: the clips that persons looked at, right ones lie up to 0.025 but for one (0.056), melts from 0.026.
_MELT = (0.043, 0.021)


def apart(tracks: list[Track]) -> list[float]:
    """For each body, 1 where it never melts into another one, below 0.5 where it does; values as in `events`.

    The frame counts in which it is the most spoilt: a melt often lasts for one or two only.
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
    """Where one of two bodies is behind the other one and cannot be seen, add how much that one is spoilt."""
    for k, track in enumerate(tracks):
        front = tracks[1 - k].pieces[frame] if len(tracks) == 2 else None
        if track.pieces[frame] is None and any(track.hidden[frame : frame + 1]) and front and not front.touch:
            value = _beyond(front, usual[1 - k]) or 0.0
            spoilt[k].append(value)
            spoilt[1 - k].append(value)


def _usual(track: Track) -> tuple[int, float] | None:
    """The shape that fits a body best while it stands alone, and its misfit; None where it hardly ever does."""
    rows = [p.misfit for p in whole(track).values() if p.misfit is not None]
    if len(rows) < 3:
        return None
    middle = [median(values) for values in zip(*rows, strict=True)]
    return middle.index(min(middle)), min(middle)


def _beyond(piece: Piece | None, usual: tuple[int, float] | None) -> float | None:
    """How much more misfit a piece has than its body alone; None where that cannot be told."""
    if piece is None or usual is None or piece.misfit is None or piece.border or piece.merged:
        return None
    return max(0.0, piece.misfit[usual[0]] - usual[1])
