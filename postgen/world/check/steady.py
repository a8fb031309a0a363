"""Whether a body is the same in every frame: there, of one size, one colour and one shape. Values as in `events`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

from postgen.world.check.events import large, ramp
from postgen.world.check.pieces import Piece
from postgen.world.check.tracks import Track

#: Roundness (`facets.roundness`) of a body that is no cube, and of a sure one; the same of a cylinder. Of 300 cubes of
#: true clips, and of such clips through the embedded autoencoder, 99 % lie below 0.08; squat cylinders above 0.09.
_ROUND = {"cube": (0.13, 0.06), "cylinder": (-0.07, 0.01)}

#: Of each frame the network's logit (`edges.roundness`) and so many times the roundness of `facets`, which is sure of
#: the cubes of true clips; their value for a body that is no cube, and for a sure one; and the rank among the frames
#: that show nearly all of it, from the roundest, whose value counts. By cross-validation over clips persons looked at.
_FACETS, _SOFT, _SOFT_RANK = 2.0, (1.45, -0.95), 0.2

#: Part of its usual area that has to be seen of a cube that touches another body.
_NEARLY = 0.8
#: Greatest change of a body's mean hue, of 6, and rise of the hue's deviation within it that lasts for three frames,
#: or a sixteenth of the clip: of a spoilt body, and of a good one. Of 559 right clips one lies above the middle.
_TINT, _MIXED = (0.056, 0.024), (0.042, 0.018)

#: Part of the picture whose hue is no body's, of a spoilt clip and of a good one.
_STAIN = (0.0011, 0.0004)


def whole(track: Track) -> dict[int, Piece]:
    """Frames in which most of a body is seen and nothing covers its outline."""
    least = 0.25 * large([p.area for p in track.pieces if p is not None])
    return {f: p for f in track.clean if (p := track.pieces[f]) is not None and p.area >= least}


def presence(track: Track) -> float:
    """1 for a body that is never missing, below 0.5 for one that is: the less, the more frames it is gone."""
    present = track.present
    missing = present.count(False) / len(present)
    return 1.0 if not missing else 0.4 * ramp(missing, 0.6, 0.0)


def size(track: Track) -> float:
    """Whether its size changes smoothly, in frames that follow each other and show all of it."""
    seen = whole(track)
    logs = {f: 0.5 * math.log(p.area) for f, p in seen.items()}
    jumps = [abs(logs[f] - logs[g]) for f, g in pairwise(logs) if g == f + 1]
    bends = [abs(logs[f - 1] - 2 * logs[f] + logs[f + 1]) for f in logs if f - 1 in logs and f + 1 in logs]
    jitter = large(bends) if len(bends) >= 4 else 0.0
    return min(ramp(jitter, 0.20, 0.08), ramp(max(jumps, default=0.0), 0.30, 0.14))


def light(track: Track) -> float:
    """Whether its brightness stays, from a frame to the next and over the whole clip."""
    seen = [p.light for p in whole(track).values()]
    if len(seen) < 2:
        return 1.0
    jump = max(abs(math.log(b / a)) for a, b in pairwise([max(v, 0.02) for v in seen]))
    return ramp(jump, 0.55, 0.22)


def hue(track: Track) -> float:
    """Whether it keeps its one hue and does not run into its neighbour: by its stains and its tint."""
    power = sum(p.stain**2 for p in track.pieces if p is not None) / len(track.pieces)
    return min(ramp(math.sqrt(power), *_STAIN), _tints(track))


def _tints(track: Track) -> float:
    """Whether its hue is the same in all frames in which nearly all of it is seen, and all over it."""
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
    """Whether in the frames with a clean outline no other shape fits much better; 0 where one does in a third."""
    outlines = [p.misfit for p in whole(track).values() if p.misfit is not None]
    if len(outlines) < 4:
        return 1.0
    other = [min(m for k, m in enumerate(row) if k != index) for row in outlines]
    wrong = sum(best < row[index] - 0.03 for best, row in zip(other, outlines, strict=True)) / len(outlines)
    return ramp(wrong, 0.36, 0.0)


def edges(track: Track, name: str) -> float:
    """Whether it has the edges of its shape, or none, in nearly two thirds of the frames with a clean outline."""
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
    """Pieces of a cube on which the network is asked: nearly all of it is seen, be it that it touches another body."""
    clean, least = whole(track), _NEARLY * large([p.area for p in track.pieces if p is not None])
    return [
        p
        for f, p in enumerate(track.pieces)
        if p is not None and p.soft is not None and p.round is not None
        if f in clean or (p.area >= least and not (p.border or p.merged))
    ]


def soft_value(soft: Sequence[float], facets: Sequence[float]) -> float:
    """How round a cube is by what the network and `facets` say of its frames: below `sum(_SOFT) / 2` it is one."""
    both = [one + _FACETS * other for one, other in zip(soft, facets, strict=True)]
    return _rank(sorted(both, reverse=True), _SOFT_RANK)


def _rank(ranked: list[float], part: float) -> float:
    return ranked[int(part * (len(ranked) - 1) + 0.5)]
