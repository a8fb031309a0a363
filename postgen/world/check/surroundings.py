"""What a clip shows besides the tracked bodies: shadows, and objects that should not be there."""

from __future__ import annotations

from collections.abc import Sequence

from postgen.world.check.pieces import Piece, Spot
from postgen.world.check.tracks import Track

#: Smallest areas that count, relative to the picture: an area that no shadow explains, alone and next to a body; a
#: shadow without a body; a coloured piece that is not a body, alone and next to a body.
_ODD, _ODD_BESIDE, _SHADOW, _PIECE, _PIECE_BESIDE = 0.0022, 0.010, 0.004, 0.0012, 0.0065
#: Largest distance of a shadow from a standing body, and sideways from a body in the air, in picture widths.
_NEAR, _ASIDE = 0.05, 0.34
#: Width of a body's rim, where colours mix.
_RIM = 0.03
#: How far the shadow of a standing body may extend below it, in picture heights.
_FOOT = 0.06


def strangers(tracks: Sequence[Track], frames: Sequence[Sequence[Spot]], pieces: Sequence[Sequence[Piece]]) -> int:
    """Return the number of frames that show an object which is neither a tracked body nor a shadow.

    A large object is no coincidence, so its frame counts twice. The function also assigns to each body its own shadow
    (`Track.shade`).

    Args:
        tracks: the tracked bodies.
        frames: the spots of each frame.
        pieces: the coloured pieces of each frame.
    """
    for track in tracks:
        track.shade = [None] * len(frames)
    flying = {id(track) for track in tracks if _flies(track)}
    count = 0
    for number, (spots, coloured) in enumerate(zip(frames, pieces, strict=True)):
        seen = [(track, piece) for track in tracks if (piece := track.pieces[number]) is not None]
        mine = {id(piece) for _, piece in seen}
        bodies = [piece for _, piece in seen]
        others = [_alone(piece, bodies) for piece in coloured if id(piece) not in mine]
        count += max([_unexplained(number, spots, seen, flying), *others])
    return count


def _flies(track: Track) -> bool:
    """Return whether a body moves up or down the picture, as a body in the air does."""
    low = [piece.box[3] for piece in track.pieces if piece is not None]
    return max(low) - min(low) > 0.05


def _alone(piece: Piece, bodies: Sequence[Piece]) -> int:
    """Return 0 for a coloured piece that belongs to a body or its rim, 1 for a separate object, 2 for a large one."""
    beside = piece.touch or any(piece.group == body.group or _along(piece.box, body) for body in bodies)
    least = _PIECE_BESIDE if beside else _PIECE
    return (piece.area >= least) + (piece.area >= max(least, 2.5 * _PIECE))


def _unexplained(number: int, spots: Sequence[Spot], seen: Sequence[tuple[Track, Piece]], flying: set[int]) -> int:
    """Return 0 if every spot is the shadow of a body, otherwise 1 or 2."""
    air: list[Spot] = []
    standing: set[int] = set()
    strange = 0
    for spot in spots:
        owners = [
            (abs(spot.x - p.x) + abs(spot.box[3] - p.box[3]), k) for k, (_, p) in enumerate(seen) if _beside(spot, p)
        ]
        along = any(_along(spot.box, piece) for _, piece in seen)
        if spot.odd >= (_ODD_BESIDE if owners or along else _ODD) and not (along and spot.odd < 0.3 * spot.area):
            strange = max(strange, 1 + (spot.odd >= (_ODD_BESIDE if owners or along else 2 * _ODD)))
        # A spot that no body touches: it may be the shadow of a body in the air, below.
        if not owners:
            # A spot over a body's rim may be the rest of a body behind it.
            if not along or spot.area >= _ODD_BESIDE:
                air.append(spot)
            continue
        # A spot next to a body: the shadow of the nearest one, unless it is too large.
        track, piece = seen[min(owners)[1]]
        if spot.area >= 0.1 * piece.area:
            standing.add(id(track))
        if track.shade[number] is None:
            track.shade[number] = spot.box[3] - piece.box[3]
        reach = sum(p.area for t, p in seen if _beside(spot, p) or (id(t) in flying and _below(spot, p)))
        strange = max(strange, 2 * (spot.area > reach))
    aloft = [(t, p) for t, p in seen if id(t) in flying and id(t) not in standing]
    for spot in air:
        if spot.area >= 0.0012:
            strange = max(strange, _in_the_air(number, spot, aloft))
    return strange


def _in_the_air(number: int, spot: Spot, aloft: list[tuple[Track, Piece]]) -> int:
    """Return 0 if a dark spot is the shadow of a body in the air, otherwise 1 or 2.

    Each body has one shadow, so its body is removed from `aloft`.
    """
    owners = [(abs(spot.x - p.x), k) for k, (_, p) in enumerate(aloft) if _below(spot, p)]
    if not owners:
        return int(spot.area >= _SHADOW)
    near = sum(piece.area for _, piece in aloft if _below(spot, piece))
    track, piece = aloft[min(owners)[1]]
    if spot.area >= 0.12 * piece.area:
        track.shade[number] = spot.box[3] - piece.box[3]
        del aloft[min(owners)[1]]
    return 2 * (spot.area >= max(_SHADOW, 0.8 * near))


def _along(box: tuple[float, float, float, float], piece: Piece) -> bool:
    """Return whether a box lies next to the box of a body."""
    x0, y0, x1, y1 = piece.box
    return box[0] <= x1 + _RIM and box[2] >= x0 - _RIM and box[1] <= y1 + _RIM and box[3] >= y0 - _RIM


def _beside(spot: Spot, piece: Piece) -> bool:
    """Return whether a spot touches a body at its sides or below, where the shadow of a standing body begins."""
    sx0, _, sx1, sy1 = spot.box
    x0, y0, x1, y1 = piece.box
    across = sx0 <= x1 + _NEAR and sx1 >= x0 - _NEAR
    return across and y0 + 0.3 * (y1 - y0) <= sy1 <= y1 + max(_FOOT, 0.17 * (y1 - y0))


def _below(spot: Spot, piece: Piece) -> bool:
    """Return whether a spot can be the shadow of a body in the air."""
    return abs(spot.x - piece.x) <= _ASIDE and spot.box[3] >= piece.box[3]
