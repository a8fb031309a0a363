"""Blobs on the host, as pieces: connected fragments of one colour are one body."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

#: Columns of a row that describes one blob, in pixels: the fields of `segment.Blobs`; then the misfit with each of
#: `spec.SHAPES`, the advantage of a foreign outline over each of them, `facets.roundness` and `edges.roundness`.
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
    """One body in one frame: centroid and box relative to the picture's size, area as a share of the picture."""

    x: float
    y: float
    area: float
    box: tuple[float, float, float, float]
    touch: bool
    border: bool
    whole: bool
    sharp: float
    #: Share of its colour in its pixels, and its greatest brightness relative to that of the named colour.
    pure: float
    light: float
    #: Area with a hue of no body (`stains.stained`) in this piece and in pieces connected with it, as a share of the
    #: picture.
    stain: float
    #: Distance of its hue from that of its colour, and variation of the hue inside the rim; the hue circle has length
    #: 6.
    tint: float
    mixed: float
    #: Misfit with each shape (in the order of `spec.SHAPES`), or None if the outline is not clean.
    misfit: tuple[float, ...] | None
    #: Advantage of the best foreign outline over each shape, or None if the outline is not clean.
    odd: tuple[float, ...] | None
    #: How much better a cylinder fits than a cube, and than a box of any height, or None if the outline is not clean.
    round: tuple[float, float] | None
    #: Logit of the network for round sides (`edges.roundness`), or None if the outline is not clean.
    soft: float | None
    group: int
    #: True if a second body of the same colour is behind this one, and both form one piece.
    merged: bool = False


def pieces(rows: Sequence[Row], height: int, width: int) -> dict[int, list[Piece]]:
    """Group the blobs of a picture into pieces by colour, the largest first.

    Args:
        rows: one row per blob, with the columns `COLUMNS`.
        height, width: size of the picture in pixels.
    """
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
        # These operations round as the weighted mean of several rows does.
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
    """An object that is not a coloured body, relative to the picture; `odd` is the area that is not a shadow."""

    area: float
    odd: float
    x: float
    y: float
    box: tuple[float, float, float, float]


def spots(rows: Sequence[Row]) -> list[Spot]:
    """Return the spots of a picture from rows with the columns `ground.SPOT_COLUMNS`."""
    return [Spot(area, odd, x, y, (x0, y0, x1, y1)) for area, odd, x, y, x0, y0, x1, y1 in rows]
