"""Whether a body is the same in every frame: present, with one size, one colour and one shape.

Values are as in `events`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from postgen.world.check.events import large, ramp
from postgen.world.check.pieces import Piece
from postgen.world.check.tracks import Track

#: Ends of the ramp over the roundness (`facets.roundness`): no cube, surely a cube; no cylinder, surely a cylinder. Of
#: 300 cubes in true clips, and in such clips after the embedded autoencoder, 99 % lie below 0.08; squat cylinders lie
#: above 0.09.
_ROUND = {"cube": (0.13, 0.06), "cylinder": (-0.07, 0.01)}

#: A frame's roundness is the logit of the network (`edges.roundness`) plus `_FACETS` times the roundness of `facets`,
#: which is reliable for cubes of true clips. `_SOFT`: ends of the ramp, no cube and surely a cube. `_SOFT_RANK`: rank
#: of the value that counts, among the frames that show nearly all of the cube, the roundest first. All were chosen by
#: cross-validation over clips that people judged by eye.
_FACETS, _SOFT, _SOFT_RANK = 2.0, (1.45, -0.95), 0.2

#: Share of its usual area that must be visible of a cube that touches another body.
_NEARLY = 0.8
#: Ends of the ramps over the greatest change of a body's mean hue, and over the rise of the hue's deviation that lasts
#: for three frames or a sixteenth of the clip: a damaged body, a good one. The hue circle has length 6. One of 559
#: right clips lies above the middle.
_TINT, _MIXED = (0.056, 0.024), (0.042, 0.018)

#: Ends of the ramp over the stained share of the picture: a damaged clip, a good one.
_STAIN = (0.0011, 0.0004)


def whole(track: Track) -> dict[int, Piece]:
    """Return the frames, with their pieces, that show most of the body and its uncovered outline."""
    least = 0.25 * large([p.area for p in track.pieces if p is not None])
    return {f: p for f in track.clean if (p := track.pieces[f]) is not None and p.area >= least}


def presence(track: Track) -> float:
    """Return 1 for a body that is never missing, and otherwise a value that falls from 0.4 with the missing share."""
    present = track.present
    missing = present.count(False) / len(present)
    return 1.0 if not missing else 0.4 * ramp(missing, 0.6, 0.0)


def size(track: Track) -> float:
    """Return whether the body's size changes smoothly over consecutive frames that show the whole body."""
    seen = whole(track)
    logs = {f: 0.5 * math.log(p.area) for f, p in seen.items()}
    jumps = [abs(logs[f] - logs[g]) for f, g in pairwise(logs) if g == f + 1]
    bends = [abs(logs[f - 1] - 2 * logs[f] + logs[f + 1]) for f in logs if f - 1 in logs and f + 1 in logs]
    jitter = large(bends) if len(bends) >= 4 else 0.0
    return min(ramp(jitter, 0.20, 0.08), ramp(max(jumps, default=0.0), 0.30, 0.14))


def light(track: Track) -> float:
    """Return whether the body's brightness stays constant from each of its frames to the next."""
    seen = [p.light for p in whole(track).values()]
    if len(seen) < 2:
        return 1.0
    jump = max(abs(math.log(b / a)) for a, b in pairwise([max(v, 0.02) for v in seen]))
    return ramp(jump, 0.55, 0.22)


def hue(track: Track) -> float:
    """Return whether the body keeps its single hue and does not melt into its neighbour, by stains and tint."""
    power = sum(p.stain**2 for p in track.pieces if p is not None) / len(track.pieces)
    return min(ramp(math.sqrt(power), *_STAIN), _tints(track))


def _tints(track: Track) -> float:
    """Return whether the hue is the same over the whole body, in all frames that show nearly all of it."""
    usual = list(whole(track).values()) or [p for p in track.pieces if p is not None]
    if not usual:
        return 1.0
    area, tint, mixed = (median([getattr(p, name) for p in usual]) for name in ("area", "tint", "mixed"))
    seen = [p for p in track.pieces if p is not None and p.area > 0.85 * area and not p.border]
    if not seen:
        return 1.0
    more = sorted((p.mixed - mixed for p in seen), reverse=True)
    last = min(max(3, len(track.pieces) // 16), len(more)) - 1
    return min(ramp(max(abs(p.tint - tint) for p in seen), *_TINT), ramp(more[last], *_MIXED))


def shape(track: Track, index: int) -> float:
    """Return whether no other shape fits much better in the frames with a clean outline.

    The value is 0 if another shape does in about a third of these frames.
    """
    outlines = [p.misfit for p in whole(track).values() if p.misfit is not None]
    if len(outlines) < 4:
        return 1.0
    other = [min(m for k, m in enumerate(row) if k != index) for row in outlines]
    wrong = sum(best < row[index] - 0.03 for best, row in zip(other, outlines, strict=True)) / len(outlines)
    return ramp(wrong, 0.36, 0.0)


def edges(track: Track, name: str) -> float:
    """Return whether the body has the edges of its shape, or has none if its shape has none.

    Nearly two thirds of the frames with a clean outline must agree.
    """
    if name not in _ROUND:
        return 1.0
    clean = whole(track)
    seen = sorted(p.round[name == "cylinder"] for p in clean.values() if p.round is not None)
    part = 0.65 if name == "cube" else 0.35
    value = ramp(_rank(seen, part), *_ROUND[name]) if len(seen) >= 4 else 1.0
    if name != "cube":
        return value
    looked = looked_at(track)
    if len(looked) < 4:
        return value
    soft, facets = [p.soft or 0.0 for p in looked], [p.round[0] if p.round else 0.0 for p in looked]
    return min(value, ramp(soft_value(soft, facets), *_SOFT))


def looked_at(track: Track) -> list[Piece]:
    """Return the pieces of a cube that the network examines.

    These show nearly all of the body; the body may touch another one.
    """
    clean, least = whole(track), _NEARLY * large([p.area for p in track.pieces if p is not None])
    return [
        p
        for f, p in enumerate(track.pieces)
        if p is not None and p.soft is not None and p.round is not None
        if f in clean or (p.area >= least and not (p.border or p.merged))
    ]


def soft_value(soft: Sequence[float], facets: Sequence[float]) -> float:
    """Return how round a cube is, by the network and by `facets`; below `sum(_SOFT) / 2` the body counts as a cube.

    Args:
        soft: logit of the network in each frame.
        facets: roundness of `facets` in each frame.
    """
    both = [one + _FACETS * other for one, other in zip(soft, facets, strict=True)]
    return _rank(sorted(both, reverse=True), _SOFT_RANK)


def _rank(ranked: list[float], part: float) -> float:
    return ranked[int(part * (len(ranked) - 1) + 0.5)]
