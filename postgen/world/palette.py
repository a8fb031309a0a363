"""Colours that the world does not have: bodies of a rendered clip are repainted, and painted back to be checked.

All light in the world is white, and everything but the bodies is nearly grey. So a linear map of RGB that keeps grey
and turns all hues by one angle repaints the bodies as if they had been rendered in the new colours. The map has an
inverse, so the exact checker of the world also judges clips in the new colours, after `unpaint`.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from postgen.errors import UserError

from .plan import sample
from .spec import COLOURS, Spec

_MOST_DRAWS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Palette:
    """New colours, made from colours of the world by turning their hue.

    Args:
        names: colour of the world -> name of the new colour that is made from it.
        turn: angle in degrees by which all hues are turned, from red towards green.
        strength: distance from grey relative to that of the colour of the world; above 0, up to 1. A turned colour
            may need more red, green or blue than a display has, and a strength below 1 leaves room for it.

    Raises:
        UserError: `names` is empty or names no colour of the world, or a number lies outside its range.
    """

    names: Mapping[str, str] = field(default_factory=lambda: {"yellow": "lime", "green": "emerald"})
    turn: float = 30.0
    strength: float = 0.7

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in COLOURS]
        if not self.names or unknown:
            raise UserError(
                f"names is {dict(self.names)}, it must map colours of the world ({', '.join(COLOURS)}) to new names."
            )
        if not -180 <= self.turn <= 180:
            raise UserError(f"turn is {self.turn}, it must lie in -180 to 180 degrees.")
        if not 0 < self.strength <= 1:
            raise UserError(f"strength is {self.strength}, it must be above 0 and at most 1.")

    def paint(self, clip: Tensor) -> Tensor:
        """Repaint the bodies of a clip (..., 3, H, W) in [0, 1]; the result is clamped to [0, 1]."""
        return self._mapped(clip, self.matrix).clamp(0, 1)

    def unpaint(self, clip: Tensor) -> Tensor:
        """Undo `paint`, clamped to [0, 1], so that the checker finds the colours of the world."""
        return self._mapped(clip, torch.linalg.inv(self.matrix)).clamp(0, 1)

    @property
    def matrix(self) -> Tensor:
        """(3, 3) map of RGB: a rotation around grey, and a scaling of the distance from grey."""
        angle, grey = math.radians(self.turn), torch.full((3, 3), 1 / 3, dtype=torch.float64)
        across = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / math.sqrt(3)
        turned = math.cos(angle) * (torch.eye(3, dtype=torch.float64) - grey) + math.sin(angle) * across
        return grey + self.strength * turned

    def sample(self, seed: int, *, num_frames: int = 17, num_bodies: int | None = None) -> Spec:
        """Draw a scene whose bodies all have colours that `names` repaints, with a camera that stands still.

        The spec holds the colours of the world, as the checker expects them; `paint` its render and `rename` its
        caption. Scenes with more bodies than the palette has colours do not occur.

        Args:
            seed: any integer.
            num_frames: length of the clip; at least 5.
            num_bodies: number of bodies, at most the number of colours; None draws it.

        Raises:
            UserError: an argument outside its range.
        """
        if num_bodies is not None and not 1 <= num_bodies <= min(3, len(self.names)):
            raise UserError(f"num_bodies is {num_bodies}, this palette allows 1 to {min(3, len(self.names))}.")
        rng = random.Random(f"postgen-palette-{seed}-{num_frames}-{num_bodies}-{sorted(self.names)}")
        for _ in range(_MOST_DRAWS):
            spec = sample(rng.getrandbits(48), num_frames=num_frames, num_bodies=num_bodies, split="all")
            if len(spec.bodies) <= len(self.names) and spec.camera == "static":
                colours = rng.sample(sorted(self.names), len(spec.bodies))
                bodies = [replace(body, colour=name) for body, name in zip(spec.bodies, colours, strict=True)]
                return replace(spec, bodies=tuple(bodies))
        raise AssertionError("half of all scenes are of this kind")

    def rename(self, caption: str) -> str:
        """Replace the colours of the world in a caption by the names of the new colours."""
        words = "|".join(map(re.escape, self.names))
        return re.sub(rf"\b({words})\b", lambda found: self.names[found[0]], caption)

    @staticmethod
    def _mapped(clip: Tensor, matrix: Tensor) -> Tensor:
        return torch.einsum("ij,...jhw->...ihw", matrix.to(clip), clip)
