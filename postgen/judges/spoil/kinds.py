"""The table of corruption kinds: judge head, strengths and function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import guests, looks, motion, whole
from .courses import COURSES
from .takes import Picked

Spoil = Callable[[Picked, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, slots=True)
class _Kind:
    head: Literal["visual", "motion"]
    strengths: tuple[float, float, float, float]
    spoil: Spoil


_KINDS = {
    "blur": _Kind("visual", (0.5, 0.9, 1.5, 3.0), whole.blur),
    "noise": _Kind("visual", (0.02, 0.04, 0.08, 0.16), whole.noise),
    "colour drift": _Kind("visual", (0.08, 0.15, 0.3, 0.6), whole.drift),
    "ground patch": _Kind("visual", (0.06, 0.12, 0.25, 0.5), whole.ground_patch),
    "outline": _Kind("visual", (0.12, 0.22, 0.32, 0.45), looks.outline),
    "melted": _Kind("visual", (0.6, 1.1, 1.8, 3.0), looks.melted),
    "flat": _Kind("visual", (0.3, 0.6, 0.8, 1.0), looks.flat),
    "stain": _Kind("visual", (0.25, 0.45, 0.7, 1.0), looks.stain),
    "dull": _Kind("visual", (0.3, 0.5, 0.75, 1.0), looks.dull),
    "ghost": _Kind("visual", (0.12, 0.22, 0.35, 0.5), guests.ghost),
    "specks": _Kind("visual", (1, 2, 4, 7), guests.specks),
    "double": _Kind("visual", (0.35, 0.7, 1.1, 1.7), guests.double),
    "flicker": _Kind("motion", (0.03, 0.06, 0.12, 0.25), whole.flicker),
    "freeze": _Kind("motion", (2, 4, 6, 9), whole.freeze),
    "vanishing": _Kind("motion", (1, 2, 4, 8), motion.vanishing),
    "strobe": _Kind("motion", (0.2, 0.4, 0.7, 1.0), motion.strobe),
    "size jitter": _Kind("motion", (0.06, 0.12, 0.2, 0.32), motion.size_jitter),
    "shape jitter": _Kind("motion", (1, 2, 4, 8), motion.shape_jitter),
    "recolouring": _Kind("motion", (0.2, 0.4, 0.7, 1.0), motion.recolouring),
    "iridescent": _Kind("motion", (1, 3, 7, 14), guests.iridescent),
}

LEVELS: dict[str, tuple[float, ...]] = {
    **{kind: row.strengths for kind, row in _KINDS.items()},
    **{kind: row.strengths for kind, row in COURSES.items()},
}
"""Kind -> the strengths of levels 1 to 4.

Blur and melting: standard deviation in pixels. Noise: standard deviation in [0,1]. Drift, flicker and patches:
relative to the brightness. Double image: radii. Ghosts: opacity. Vanishing, freezing, shape jitter and iridescence:
frames. Specks: number. Outline: height of its waves relative to the radius. Size jitter: change relative to the
radius. Flatness, stains, dullness, strobing and recolouring: share that is mixed in. All others: see `COURSES`.
"""

HEAD: dict[str, Literal["visual", "motion"]] = {
    **{kind: row.head for kind, row in _KINDS.items()},
    **dict.fromkeys(COURSES, "motion"),
}
"""Kind -> head of the judge: `visual` for faults visible in one frame, `motion` for faults across frames."""

ON_ANY_CLIP = ("blur", "noise", "colour drift", "flicker", "freeze")
"""Kinds that need only the clip itself, and no other render of its scene."""


def corrupt(kind: str, level: Tensor, picked: Picked, generator: torch.Generator) -> Tensor:
    """Return corrupted clips (B,T,3,H,W) in [0,1].

    Args:
        kind: key of `LEVELS`.
        level: (B,) int64, 0 to 4.
        picked: scenes that show the kind, from `Takes.pick`.
        generator: random generator on the device of the clips.
    """
    if kind in COURSES:
        spoilt = picked.course(kind, level)
    else:
        strengths = torch.tensor((0.0, *LEVELS[kind]), device=level.device)
        spoilt = _KINDS[kind].spoil(picked, strengths[level], generator)
    return torch.where((level > 0).reshape(-1, 1, 1, 1, 1), spoilt, picked.clean).clamp(0, 1)
