"""The parts of a prompt that the world understands. Plain data, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .spec import Spec


@dataclass(frozen=True, slots=True)
class Clause:
    """A part of a prompt, and the reason why it cannot be judged; an empty reason means that it can."""

    text: str
    why: str = ""

    @property
    def readable(self) -> bool:
        """Whether the whole clause is understood."""
        return not self.why


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt as the world understands it: the scene, the clauses, and for each body its place and its direction.

    `places` are names of `spec.PLACES`; `headings` are "left" or "right", for events of two bodies. An entry is None
    where the prompt does not specify it.
    """

    scene: Spec
    clauses: tuple[Clause, ...]
    places: tuple[str | None, ...]
    headings: tuple[str | None, ...]

    @classmethod
    def of(cls, scene: Spec) -> Reading:
        """Return the reading of a scene that has no prompt."""
        nothing = (None,) * len(scene.bodies)
        return cls(scene, (), nothing, nothing)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; `from_dict` reads it back."""
        return {
            "scene": self.scene.to_dict(),
            "clauses": [[c.text, c.why] for c in self.clauses],
            "places": self.places,
            "headings": self.headings,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Reading:
        """Read the JSON form of `to_dict`."""
        clauses = tuple(Clause(*c) for c in data["clauses"])
        return cls(Spec.from_dict(data["scene"]), clauses, tuple(data["places"]), tuple(data["headings"]))
