"""Scenes whose bodies ("puppets") can have any place in each frame and any colour, on a ground of any colour.

The renderer is affine in the albedo of each body and of the ground. So a combination of four renders in named colours
equals a render in any other colour, including edges and shadows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from postgen import world
from postgen.world.camera import FOCAL, project_point
from postgen.world.physics import Simulation
from postgen.world.spec import BACKGROUNDS, COLOURS, SHAPES, Body, Spec

RGB = tuple[float, float, float]
#: A position far beyond the fog, where a body is not visible.
NOWHERE = (0.0, 900.0, 0.6)
#: Number of rays per pixel and axis.
SUPERSAMPLE = 2
_BASIS = ("red", "green", "blue", "yellow")


@dataclass(frozen=True, kw_only=True, slots=True)
class Puppet(Body):
    """A body of any size. If `rgb` is given, it is the albedo of the body."""

    scale: float = 1.0
    rgb: RGB | None = None

    @property
    def radius(self) -> float:
        """Radius of the contact circle in metres."""
        return {"small": 0.45, "medium": 0.6, "large": 0.8}[self.size] * self.scale


@dataclass(slots=True)
class Take:
    """A scene as frames of puppets: `frames[f][k]` is body k in frame f, and `spec` is the original scene."""

    spec: Spec
    frames: list[list[Puppet]]
    size: int = 96
    ground: RGB | None = None

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def prompt(self) -> str:
        """Simple caption of the scene."""
        return world.simple_caption(self.spec)

    def edit(self, body: int, change: Callable[[int, Puppet], Puppet]) -> Take:
        """Change one body in every frame by `change(frame, puppet)`; return this take."""
        for number, frame in enumerate(self.frames):
            frame[body] = change(number, frame[body])
        return self

    def add(self, make: Callable[[int], Puppet]) -> Take:
        """Add a body, made by `make(frame)`; return this take."""
        for number, frame in enumerate(self.frames):
            frame.append(make(number))
        return self

    def shoot(self) -> Tensor:
        """Render the clip (F,3,H,W)."""
        plain = self._render(self.spec.background, {})
        clip = plain
        for body in range(len(self.frames[0])):
            if any(frame[body].rgb is not None for frame in self.frames):
                clip = clip + self._recoloured(body) - plain
        if self.ground is not None:
            clip = clip + self._grounded() - plain
        return clip.clamp(0, 1)

    def _recoloured(self, body: int) -> Tensor:
        table = {name: COLOURS[name] for name in _BASIS}
        asked = [frame[body].rgb or COLOURS[frame[body].colour] for frame in self.frames]
        weight = torch.stack([_mix(rgb, list(table.values())) for rgb in asked])
        shots = torch.stack([self._render(self.spec.background, {body: name}) for name in _BASIS])
        return torch.einsum("fk,kfchw->fchw", weight, shots)

    def _grounded(self) -> Tensor:
        assert self.ground is not None
        weight = _mix(self.ground, list(BACKGROUNDS.values()))
        shots = torch.stack([self._render(name, {}) for name in BACKGROUNDS])
        return torch.einsum("k,kfchw->fchw", weight, shots)

    def _render(self, background: str, colours: dict[int, str]) -> Tensor:
        specs = []
        for frame in self.frames:
            bodies = [replace(b, colour=colours.get(k, b.colour)) for k, b in enumerate(frame)]
            specs.append(replace(self.spec, bodies=tuple(bodies), background=background, camera="static"))
        shots = world.render(specs, num_frames=1, size=self.size, supersample=SUPERSAMPLE, geometry=False)
        return shots.rgb_BF3HW[:, 0]


def _mix(rgb: RGB, table: Sequence[RGB]) -> Tensor:
    """Return the weights with sum 1 that mix `rgb` from four colours."""
    rows = torch.tensor([[*c, 1.0] for c in table], dtype=torch.float64).T
    return torch.linalg.solve(rows, torch.tensor([*rgb, 1.0], dtype=torch.float64)).float()


def take(spec: Spec, frames: int = 17, size: int = 96) -> Take:
    """Return a scene with its true motion, frame by frame."""
    motion = Simulation([spec]).run(frames).positions_BFK3[0].tolist()
    puppets = [
        [
            Puppet(colour=b.colour, shape=b.shape, size=b.size, position=tuple(place), yaw=b.yaw)
            for b, place in zip(spec.bodies, places, strict=True)
        ]
        for places in motion
    ]
    return Take(spec, puppets, size)


def scene(rng: random.Random, event: str | None = None, bodies: int | None = None, frames: int = 17) -> Spec:
    """Draw a scene of the world with a static camera."""
    return world.sample(
        rng.randrange(10**9), num_frames=frames, num_bodies=bodies, event=event, camera="static", split="all"
    )


def shot(rng: random.Random, event: str | None = None, bodies: int | None = 1, size: int = 96) -> Take:
    """Draw a scene at random; return it with its true motion in 17 frames."""
    return take(scene(rng, event, bodies), 17, size)


def at(body: Puppet, x: float | None = None, y: float | None = None, z: float | None = None) -> Puppet:
    """Return the body at another position. Coordinates that are None stay."""
    px, py, pz = body.position
    return replace(body, position=(px if x is None else x, py if y is None else y, pz if z is None else z))


def moved(body: Puppet, dx: float = 0.0, dy: float = 0.0, dz: float = 0.0) -> Puppet:
    """Return the body shifted by (dx, dy, dz) metres."""
    x, y, z = body.position
    return replace(body, position=(x + dx, y + dy, z + dz))


def gone(body: Puppet) -> Puppet:
    """Return the body at a position where it is not visible."""
    return replace(body, position=NOWHERE)


def scaled(body: Puppet, factor: float) -> Puppet:
    """Scale the body by `factor`, and keep its height above the floor."""
    lift = body.position[2] - body.half_height
    new = replace(body, scale=body.scale * factor)
    return at(new, z=new.half_height + lift)


def shaped(body: Puppet, shape: str) -> Puppet:
    """Give the body another shape, and keep its height above the floor."""
    lift = body.position[2] - body.half_height
    new = replace(body, shape=shape, yaw=0.4 if shape == "cube" else 0.0)
    return at(new, z=new.half_height + lift)


def disc(body: Puppet) -> tuple[float, float, float]:
    """Return the centre and the radius of the body in the picture, in picture widths."""
    u, v, depth = project_point(body.position)
    return (u + 1) / 2, (v + 1) / 2, FOCAL * body.radius / depth / 2


def free_place(rng: random.Random, clip: Take, like: Puppet, apart: float = 1.25) -> Puppet:
    """Place the body inside the picture and clear of all others in all frames; use the best of 200 places."""
    best, most = like, -1.0
    for _ in range(200):
        body = replace(like, position=(rng.uniform(-2.2, 2.2), rng.uniform(-1.6, 2.4), like.half_height))
        x, y, r = disc(body)
        room = min(x, 1 - x, y, 1 - y) - r
        for frame in clip.frames:
            for other in frame:
                s, t, q = disc(other)
                room = min(room, math.hypot(x - s, y - t) - apart * (r + q))
        if room > most:
            best, most = body, room
        if room > 0.01:
            break
    return best


def other(rng: random.Random, table: Sequence[str], *not_these: str) -> str:
    """Return a random name of a table that is none of `not_these`."""
    return rng.choice([name for name in table if name not in not_these])


def extra(rng: random.Random, clip: Take, **how: object) -> Puppet:
    """Make an additional body at a free place. By default its colour differs from those of all other bodies."""
    taken = {b.colour for b in clip.frames[0]}
    made = {"colour": other(rng, list(COLOURS), *taken), "shape": rng.choice(SHAPES), "size": "small", **how}
    body = Puppet(**made)  # type: ignore[arg-type]
    return free_place(rng, clip, replace(body, yaw=0.3 if body.shape == "cube" else 0.0))
