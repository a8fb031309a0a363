"""Motion of the bodies in torch, batched over scenes: gravity, a floor that bounces, rolling, collisions, walls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import UserError

from .plan import GRAVITY
from .spec import Body, Spec

SUBSTEPS = 8
WALL_X, WALL_Y = 4.0, 3.5
_ABSENT = 1.0e3
_COLLISION_RESTITUTION = 0.9


@dataclass(slots=True)
class Motion:
    """State of every body at every frame, for B scenes, F frames and K body slots. An absent body lies 1 km away.

    `positions_BFK3` in metres. `rotations_BFK33`: rotation from body to world. `contact_BFK`, int8: contacts since the
    previous frame; bit 1 is a landing on the floor, bit 2 a hit between bodies.
    """

    positions_BFK3: Tensor
    rotations_BFK33: Tensor
    contact_BFK: Tensor

    def first(self, frames: int) -> Motion:
        """Return the motion of the first `frames` frames only."""
        return Motion(self.positions_BFK3[:, :frames], self.rotations_BFK33[:, :frames], self.contact_BFK[:, :frames])


class Simulation:
    """A batch of scenes that is advanced frame by frame, so a clip of any length needs constant memory.

    Args:
        specs: scenes with the same fps.
        device: device of the state.

    Raises:
        UserError: no scene, or different frame rates.
    """

    def __init__(self, specs: Sequence[Spec], device: torch.device | str = "cpu") -> None:
        if not specs or len({s.fps for s in specs}) != 1:
            raise UserError("A simulation needs at least one spec, all with the same fps.")
        slots = max(len(s.bodies) for s in specs)
        rows = [[_row(s.bodies[k]) if k < len(s.bodies) else _ABSENT_ROW for k in range(slots)] for s in specs]
        table = torch.tensor(rows, device=device)
        self.position, self.velocity = table[..., 0:3].clone(), table[..., 3:6].clone()
        self.rest, self.radius, self.restitution = table[..., 6], table[..., 7], table[..., 8]
        self.rolls = table[..., 9]
        self.present = self.radius > 0
        yaw = table[..., 10]
        zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
        rows3 = [yaw.cos(), -yaw.sin(), zero, yaw.sin(), yaw.cos(), zero, zero, zero, one]
        self.rotation = torch.stack(rows3, -1).unflatten(-1, (3, 3))
        self.dt = 1.0 / (specs[0].fps * SUBSTEPS)
        self.touched = torch.zeros(self.radius.shape, dtype=torch.int8, device=device)
        self._started = False

    def run(self, num_frames: int) -> Motion:
        """Advance the scenes and return their next `num_frames` frames.

        The first call starts at frame 0, with the state of the specs.
        """
        positions, rotations, contacts = [], [], []
        for _ in range(num_frames):
            if self._started:
                self.touched = torch.zeros_like(self.touched)
                for _ in range(SUBSTEPS):
                    self._substep()
            self._started = True
            positions.append(self.position)
            rotations.append(self.rotation)
            contacts.append(self.touched)
        return Motion(torch.stack(positions, 1), torch.stack(rotations, 1), torch.stack(contacts, 1))

    def _substep(self) -> None:
        position, velocity, dt = self.position, self.velocity, self.dt
        x, y, z = position.unbind(-1)
        vx, vy, vz = velocity.unbind(-1)
        resting = (z <= self.rest + 1e-6) & (vz.abs() <= 1.5 * GRAVITY * dt)
        fall = torch.where(self.present & ~resting, GRAVITY * dt, 0.0)
        # A semi-implicit step with a half-step correction: a free fall is exact at every step.
        z = z + (vz - 0.5 * fall) * dt
        vz = torch.where(resting, 0.0, vz - fall)
        x, y = x + vx * dt, y + vy * dt
        landed = self.present & (z <= self.rest) & (vz < 0)
        speed = torch.where(self.restitution > 0.5, self.restitution * vz.abs(), 0.0)
        vz = torch.where(landed, speed, vz)
        z = torch.where(self.present, torch.maximum(z, self.rest), z)
        vx = torch.where(self.present & (x.abs() > WALL_X), -vx.abs() * x.sign(), vx)
        vy = torch.where(self.present & (y.abs() > WALL_Y), -vy.abs() * y.sign(), vy)
        self.position = torch.stack((x, y, z), -1)
        self.velocity = torch.stack((vx, vy, vz), -1)
        self.touched = self.touched | (landed & (speed > 0.2) | landed & (self.restitution < 0.5)).to(torch.int8)
        if position.shape[1] > 1:
            self._collide()
        self._roll()

    def _collide(self) -> None:
        slots = self.position.shape[1]
        mass = self.radius.clamp_min(1e-3) ** 3
        for i in range(slots):
            for j in range(i + 1, slots):
                offset = self.position[:, j] - self.position[:, i]
                distance = offset.norm(dim=-1).clamp_min(1e-6)
                flat = offset * offset.new_tensor([1.0, 1.0, 0.0])
                normal = flat / flat.norm(dim=-1, keepdim=True).clamp_min(1e-6)
                closing = ((self.velocity[:, i] - self.velocity[:, j]) * normal).sum(-1)
                meets = self.present[:, i] & self.present[:, j]
                meets = meets & (distance < self.radius[:, i] + self.radius[:, j]) & (closing > 0)
                total = mass[:, i] + mass[:, j]
                impulse = torch.where(meets, (1 + _COLLISION_RESTITUTION) * closing / total, 0.0)[:, None] * normal
                change = torch.zeros_like(self.velocity)
                change[:, i] = -impulse * mass[:, j, None]
                change[:, j] = impulse * mass[:, i, None]
                self.velocity = self.velocity + change
                flag = (meets.to(torch.int8) * 2)[:, None]
                pair = torch.zeros_like(self.touched)
                pair[:, [i, j]] = flag
                self.touched = self.touched | pair

    def _roll(self) -> None:
        """Rotate the balls by v x dt / r about the horizontal axis across their motion (rolling without slipping)."""
        radius = self.radius.clamp_min(1e-3)
        axis = torch.stack((-self.velocity[..., 1], self.velocity[..., 0], torch.zeros_like(radius)), -1)
        turn = axis * (self.rolls * self.dt / radius)[..., None]
        a, b, c = turn.unbind(-1)
        zero = torch.zeros_like(a)
        skew = torch.stack((zero, -c, b, c, zero, -a, -b, a, zero), -1).unflatten(-1, (3, 3))
        # Two terms of exp(skew) suffice, as a substep turns by less than 0.05 rad; `_orthonormal` corrects the drift.
        self.rotation = _orthonormal(self.rotation + skew @ self.rotation + 0.5 * (skew @ (skew @ self.rotation)))


def _orthonormal(rotation: Tensor) -> Tensor:
    """Take one Newton step towards the nearest rotation matrix."""
    return 1.5 * rotation - 0.5 * rotation @ rotation.mT @ rotation


def _row(body: Body) -> list[float]:
    rolls = 1.0 if body.shape == "ball" else 0.0
    return [
        *body.position,
        *body.velocity,
        body.half_height,
        body.radius,
        body.restitution,
        rolls,
        body.yaw,
    ]


_ABSENT_ROW = [0.0, _ABSENT, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
