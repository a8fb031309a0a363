"""Renders of scenes in the versions that the corruptions need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from postgen import world
from postgen.world.physics import Motion, Simulation
from postgen.world.spec import COLOURS, PAIR_EVENTS, SHAPES, Spec

from .courses import COURSES, course_frames

_AT_ONCE = 256
_MOVING = ("moves left", "moves right", "moves closer", "moves away")
_NOWHERE = (0.0, 900.0, 0.6)
"""Position far beyond the fog, where a body is not visible."""


def shows(kind: str, spec: Spec) -> bool:
    """Return whether a scene can show a kind at all; for example, freezing is invisible on a resting body."""
    if kind in COURSES:
        return COURSES[kind].shows(spec)
    return kind != "freeze" or spec.bodies[0].event in _MOVING


@dataclass(slots=True)
class Course:
    """Renders of one kind at its four strengths: `clips` (4,R,T,3,H,W) uint8; `row` (N,) of each scene, or -1."""

    clips: Tensor
    row: Tensor


@dataclass(slots=True)
class Takes:
    """Renders of N scenes, uint8: unchanged, without their first body, and with this body in another shape.

    `clean`, `empty`, `other` (N,T,3,H,W). `matte` (N,T,2,H,W): part of a pixel that is covered by the first body, and
    by any body. `colour` (N,3): albedo of the first body. `plain`: indices of the scenes whose event does not hide the
    first body, or of all scenes if there are none. `courses`: renders for each kind of `COURSES`.
    """

    clean: Tensor
    empty: Tensor
    other: Tensor
    matte: Tensor
    colour: Tensor
    plain: Tensor
    specs: list[Spec]
    courses: dict[str, Course] = field(default_factory=dict)

    def rows(self, kind: str) -> Tensor:
        """Return the indices of the scenes that show a kind and are rendered for it."""
        if kind in self.courses:
            return (self.courses[kind].row >= 0).nonzero()[:, 0]
        shown = [row for row, spec in enumerate(self.specs) if shows(kind, spec)]
        return torch.tensor(shown, dtype=torch.long, device=self.clean.device)

    def pick(self, rows: Tensor) -> Picked:
        """Select some of the scenes."""
        return Picked(self, rows)


class Picked:
    """Some scenes of `Takes` as floats in [0,1]; `clean`, `empty`, `other` and `matte` are converted on first access.

    Args:
        takes: output of `render_takes`.
        rows: (B,) indices of the scenes, on the device of the takes.
    """

    def __init__(self, takes: Takes, rows: Tensor) -> None:
        self.takes, self.rows = takes, rows

    @classmethod
    def of(cls, clips: Tensor) -> Picked:
        """Wrap clips (B,T,3,H,W) in [0,1] without further renders, for the kinds of `ON_ANY_CLIP`."""
        none = clips[:0]
        picked = cls(Takes(none, none, none, none, none, none, []), torch.arange(len(clips), device=clips.device))
        picked.__dict__["clean"] = clips
        return picked

    @cached_property
    def clean(self) -> Tensor:
        """The unchanged clips, (B,T,3,H,W)."""
        return self.takes.clean[self.rows].float() / 255

    @cached_property
    def empty(self) -> Tensor:
        """The clips without the first body, (B,T,3,H,W)."""
        return self.takes.empty[self.rows].float() / 255

    @cached_property
    def other(self) -> Tensor:
        """The clips with the first body in another shape, (B,T,3,H,W)."""
        return self.takes.other[self.rows].float() / 255

    @cached_property
    def matte(self) -> Tensor:
        """Part of each pixel covered by the first body, and by any body: (B,T,2,H,W)."""
        return self.takes.matte[self.rows].float() / 255

    @property
    def colour(self) -> Tensor:
        """Albedo of the first body, (B,3)."""
        return self.takes.colour[self.rows]

    def course(self, kind: str, level: Tensor) -> Tensor:
        """Return the scenes at levels 1 to 4 (B,) of a kind of `COURSES`; level 0 is treated as 1."""
        course = self.takes.courses[kind]
        return course.clips[(level - 1).clamp_min(0), course.row[self.rows]].float() / 255

    def guests(self, generator: torch.Generator) -> Picked:
        """Draw as many other scenes, in which the first body is completely visible."""
        plain = self.takes.plain
        drawn = torch.randint(len(plain), self.rows.shape, generator=generator, device=self.rows.device)
        drawn = (drawn + (plain[drawn] == self.rows).long()) % len(plain)
        return Picked(self.takes, plain[drawn])


def render_takes(specs: list[Spec], size: int, device: torch.device | str, most: int | None = None) -> Takes:
    """Render scenes and the versions of them that the corruptions need.

    Args:
        specs: scenes of one length.
        size: height and width in pixels.
        device: device of the computation and of the result.
        most: largest number of scenes that are rendered for each kind of `COURSES` but `teleport`, which is rendered
            for all; None renders all scenes that show the kind.
    """
    parts = [_scenes(specs[low : low + _AT_ONCE], size, device) for low in range(0, len(specs), _AT_ONCE)]
    clean, empty, other, matte = (torch.cat(column) for column in zip(*parts, strict=True))
    colour = torch.tensor([COLOURS[spec.bodies[0].colour] for spec in specs], device=device)
    whole = [row for row, spec in enumerate(specs) if spec.bodies[0].event not in PAIR_EVENTS]
    plain = torch.tensor(whole or range(len(specs)), device=device)
    courses = {kind: _course(kind, specs, size, device, most) for kind in COURSES}
    return Takes(clean, empty, other, matte, colour, plain, specs, courses)


def _bytes(picture: Tensor) -> Tensor:
    return (picture * 255).round().to(torch.uint8)


def _scenes(specs: list[Spec], size: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Render scenes; return clean clips, clips without the first body, with another shape, and the matte."""
    motion = Simulation(specs, device).run(specs[0].num_frames)
    # One ray per quarter of a pixel: the average equals a render with 2x2 rays, and gives the share of the bodies too.
    fine = world.render(specs, size=2 * size, supersample=1, device=device, motion=motion)
    assert fine.ids_BFHW is not None
    filled = torch.stack((fine.ids_BFHW == 1, fine.ids_BFHW > 0), 2).float()
    pooled = [functional.avg_pool2d(part.flatten(0, 1), 2) for part in (fine.rgb_BF3HW, filled)]
    clean, matte = (part.unflatten(0, (len(specs), -1)) for part in pooled)
    places = motion.positions_BFK3.clone()
    places[:, :, 0] = places.new_tensor(_NOWHERE)
    empty = pictures(specs, size, device, _along(motion, places))
    shaped = [_reshaped(spec) for spec in specs]
    places = motion.positions_BFK3.clone()
    lift = [b.bodies[0].half_height - a.bodies[0].half_height for a, b in zip(specs, shaped, strict=True)]
    places[:, :, 0, 2] += places.new_tensor(lift)[:, None]
    return _bytes(clean), empty, pictures(shaped, size, device, _along(motion, places)), _bytes(matte)


def _along(motion: Motion, places_BFK3: Tensor) -> Motion:
    return Motion(places_BFK3, motion.rotations_BFK33, motion.contact_BFK)


def pictures(specs: Sequence[Spec], size: int, device: torch.device | str, motion: Motion) -> Tensor:
    """Render scenes along a motion: (B,T,3,H,W) uint8."""
    return _bytes(world.render(specs, size=size, geometry=False, device=device, motion=motion).rgb_BF3HW)


def _reshaped(spec: Spec) -> Spec:
    """Give the first body another shape of about the same width."""
    first = spec.bodies[0]
    step = 1 + int(10 * spec.floor_phase[0]) % 2
    shape = SHAPES[(SHAPES.index(first.shape) + step) % len(SHAPES)]
    body = replace(first, shape=shape, yaw=0.4 if shape == "cube" else 0.0)
    return replace(spec, bodies=(body, *spec.bodies[1:]))


def _course(kind: str, specs: list[Spec], size: int, device: torch.device | str, most: int | None) -> Course:
    """Render a kind at its four strengths, for the scenes that show it."""
    how = COURSES[kind]
    chosen = [row for row, spec in enumerate(specs) if how.shows(spec)]
    chosen = chosen if most is None or kind == "teleport" else chosen[:most]
    row = torch.full((len(specs),), -1, dtype=torch.long)
    row[chosen] = torch.arange(len(chosen))
    frames = specs[0].num_frames
    clips = torch.empty((4, len(chosen), frames, 3, size, size), dtype=torch.uint8, device=device)
    for low in range(0, len(chosen), _AT_ONCE):
        some = [specs[k] for k in chosen[low : low + _AT_ONCE]]
        motion = Simulation(some, device).run(course_frames(frames))
        true = motion.positions_BFK3.cpu()
        for level, strength in enumerate(how.strengths):
            places = torch.stack([how.way(true[k], spec, strength) for k, spec in enumerate(some)])
            moved = _along(motion.first(frames), places[:, :frames].to(device))
            clips[level, low : low + len(some)] = pictures(some, size, device, moved)
    return Course(clips, row.to(device))
