"""What was understood of a prompt. Plain data, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .spec import Spec


@dataclass(frozen=True, slots=True)
class Clause:
    """A part of a prompt, and why it cannot be judged (empty: it can)."""

    text: str
    why: str = ""

    @property
    def readable(self) -> bool:
        """Whether all of it is understood."""
        return not self.why


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt as it was read: the scene, the clauses, and of each body where it should be and which way it goes.

    `places` are names of `spec.PLACES`; `headings` "left" or "right", of two-body events; None where nothing is said.
    """

    scene: Spec
    clauses: tuple[Clause, ...]
    places: tuple[str | None, ...]
    headings: tuple[str | None, ...]

    @classmethod
    def of(cls, scene: Spec) -> Reading:
        """A scene without words."""
        nothing = (None,) * len(scene.bodies)
        return cls(scene, (), nothing, nothing)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` reads it back."""
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
