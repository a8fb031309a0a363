"""Blobs on the host, as pieces: fragments of one colour that hang together are one body."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

#: What a row says of one blob, in pixels: what `segment.Blobs` says, then the misfit with each of `spec.SHAPES`, and
#: how much better the outline of something else fits than each of them, then `facets.roundness`, `edges.roundness`.
_OF_BLOBS = (
    "colour",
    "group",
    "touch",
    "border",
    "area",
    "x",
    "y",
    "sharp",
    "pure",
    "light",
    "stain",
    "tint",
    "mixed",
)
COLUMNS = (*_OF_BLOBS, "x0", "y0", "x1", "y1")
_TOUCH, _BORDER, _AREA, _X, _Y, _SHARP, _PURE, _LIGHT, _STAIN, _TINT, _MIXED, _X0, _Y0, _X1, _Y1 = range(
    2, len(COLUMNS)
)

Row = Sequence[float]


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
    #: Share of its colour in its pixels, and brightness of its lightest one over that of the named colour.
    pure: float
    light: float
    #: Part of the picture, in it and what hangs together with it, whose hue is no body's (`stains.stained`).
    stain: float
    #: How far its hue is from that of its colour, of 6, and how much it differs within the rim.
    tint: float
    mixed: float
    #: Misfit with every shape (in the order of `spec.SHAPES`), or None where the outline is not clean.
    misfit: tuple[float, ...] | None
    #: How much better than each shape the outline of none of them fits, or None as well.
    odd: tuple[float, ...] | None
    #: How much rather it is a cylinder than a cube, and than a box of any height, or None as well.
    round: tuple[float, float] | None
    #: By the network, how surely it has round sides (`edges.roundness`), or None as well.
    soft: float | None
    group: int
    #: A second body of its colour is behind it, in one piece with it.
    merged: bool = False


def pieces(rows: Sequence[Row], height: int, width: int) -> dict[int, list[Piece]]:
    """Pieces of a picture of that many pixels by colour, the largest first; its rows are those of `COLUMNS`."""
    parts: dict[tuple[float, float], list[Row]] = {}
    for row in rows:
        parts.setdefault((row[0], row[1]), []).append(row)
    result: dict[int, list[Piece]] = {}
    for (colour, _), part in parts.items():
        result.setdefault(int(colour), []).append(_piece(part, height, width))
    for found in result.values():
        if len(found) > 1:
            found.sort(key=attrgetter("area"), reverse=True)
    return result


def _piece(rows: list[Row], height: int, width: int) -> Piece:
    if len(rows) == 1:
        _, group, touch, border, area, x, y, sharp, pure, light, stain, tint, mixed, *box = rows[0]
        (x0, y0, x1, y1), misfit = box[:4], box[4:]
        # Rounded as the weighted mean of several is.
        x, y, sharp = x * area / area, y * area / area, sharp * area / area
        whole = misfit[0] < float("inf")
    else:
        group, misfit, whole = rows[0][1], [], False
        area = sum(row[_AREA] for row in rows)
        x, y, sharp, pure, tint, mixed = (
            sum(row[k] * row[_AREA] for row in rows) / area for k in (_X, _Y, _SHARP, _PURE, _TINT, _MIXED)
        )
        light, stain = (max(row[k] for row in rows) for k in (_LIGHT, _STAIN))
        x0, y0 = (min(row[k] for row in rows) for k in (_X0, _Y0))
        x1, y1 = (max(row[k] for row in rows) for k in (_X1, _Y1))
        touch, border = (any(row[k] for row in rows) for k in (_TOUCH, _BORDER))
    return Piece(
        x=(x + 0.5) / width,
        y=(y + 0.5) / height,
        area=area / (width * height),
        box=(x0 / width, y0 / height, (x1 + 1) / width, (y1 + 1) / height),
        touch=bool(touch),
        border=bool(border),
        whole=whole,
        sharp=sharp,
        pure=pure,
        light=light,
        stain=stain / (width * height),
        tint=tint,
        mixed=mixed,
        misfit=tuple(misfit[:3]) if whole else None,
        odd=tuple(misfit[3:6]) if whole else None,
        round=(misfit[6], misfit[7]) if whole else None,
        soft=misfit[8] if whole else None,
        group=int(group),
    )


@dataclass(slots=True)
class Spot:
    """Something that is no coloured body, in parts of the picture; `odd` is the area that is no shadow."""

    area: float
    odd: float
    x: float
    y: float
    box: tuple[float, float, float, float]


def spots(rows: Sequence[Row]) -> list[Spot]:
    """Spots of a picture; its rows are those of `ground.SPOT_COLUMNS`."""
    return [Spot(area, odd, x, y, (x0, y0, x1, y1)) for area, odd, x, y, x0, y0, x1, y1 in rows]
