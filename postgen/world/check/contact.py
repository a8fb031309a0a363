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
#: the clips that persons looked at, right ones lie up to 0.027, melts from 0.034; renders after the embedded
#: autoencoder up to 0.031.
_MELT = (0.043, 0.023)
#: A melt has to last as long as this many frames, or a sixteenth of the clip.
_FRAMES = 3


def apart(tracks: list[Track]) -> list[float]:
    """For each body, 1 where it never melts into another one, below 0.5 where it does; values as in `events`."""
    usual = [_usual(track) for track in tracks]
    spoilt: list[list[float]] = [[] for _ in tracks]
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
    return [_value(values, len(track.pieces)) for track, values in zip(tracks, spoilt, strict=True)]


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


def _value(spoilt: list[float], frames: int) -> float:
    if not spoilt:
        return 1.0
    last = min(max(_FRAMES, frames // 16), len(spoilt)) - 1
    return ramp(sorted(spoilt, reverse=True)[last], *_MELT)
