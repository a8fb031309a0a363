"""Pictures of upright prisms between a cube and a cylinder, for `postgen.judges.world_edges`.

The footprint is the convex hull of four discs in the corners of a square. Their radius is zero for a cube and half the
side of the square for a cylinder; radii between give drums, half cylinders and cubes with round corners. A prism is an
intersection of half-spaces. Camera and colours are those of the world; light, floor and shadows are similar.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from postgen.world.camera import camera_path
from postgen.world.raycast import camera_rays
from postgen.world.spec import BACKGROUNDS, Body, Spec

#: Number of sides of the polygon that approximates a footprint.
_SIDES = 48
_SUPERSAMPLE = 2
_CORNERS = torch.tensor([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])


@dataclass(slots=True)
class Prism:
    """One body: position of its foot, half width and height in metres, yaw, RGB, and the roundness of its corners.

    `corners` are in [0,1], before the rotation, anticlockwise from the left corner that is near the camera.
    """

    foot: tuple[float, float, float]
    half: float
    height: float
    yaw: float
    rgb: tuple[float, float, float]
    corners: tuple[float, float, float, float]

    @property
    def roundness(self) -> float:
        """From 0 for a cube to 1 for a body that no person calls a cube; computed from the two roundest corners."""
        return min(1.0, max(0.0, (sum(sorted(self.corners)[2:]) / 2 - 0.12) / 0.4))


def _hit(origin: Tensor, ray: Tensor, body: Prism) -> tuple[Tensor, Tensor]:
    """Return the distance (P,) of rays (P,3) from `origin` (P,3) to a prism, `inf` for a miss, and normals (P,3)."""
    # Footprint: the support of the hull of four discs in each direction of the polygon, in the frame of the body.
    angle = torch.arange(_SIDES) * (2 * math.pi / _SIDES)
    plane = torch.stack((angle.cos(), angle.sin()), -1)
    radius = torch.tensor(body.corners)
    centre = _CORNERS * (1 - radius)[:, None]
    support = plane @ centre.T + radius
    reach, own = support.max(1)
    turn = torch.tensor([[math.cos(body.yaw), math.sin(body.yaw)], [-math.sin(body.yaw), math.cos(body.yaw)]])
    start = (origin[:, :2] - torch.tensor(body.foot[:2])) @ turn.T
    way = ray[:, :2] @ turn.T
    # A ray is inside the body between the last half-space that it enters and the first that it leaves.
    speed = way @ plane.T
    gap = reach * body.half - start @ plane.T
    safe = torch.where(speed.abs() < 1e-7, 1e-7, speed)
    t = gap / safe
    enter, side = torch.where(speed < 0, t, -torch.inf).max(1)
    leave = torch.where(speed >= 0, t, torch.inf).amin(1)
    low, high = body.foot[2] - origin[:, 2], body.foot[2] + body.height - origin[:, 2]
    down = torch.where(ray[:, 2].abs() < 1e-7, 1e-7, ray[:, 2])
    first, second = torch.minimum(low / down, high / down), torch.maximum(low / down, high / down)
    top = first > enter
    enter, leave = torch.maximum(enter, first), torch.minimum(leave, second)
    # Normals: flat on straight sides, round on the discs of rounded corners, and upwards on the top.
    point = start + enter.clamp(-1e3, 1e3)[:, None] * way
    corner = own[side]
    round_ = point - centre[corner] * body.half
    flat = plane[side]
    both = (support[side] > reach[side][:, None] - 1e-4).sum(1) > 1
    smooth = torch.where((both | (radius[corner] < 1e-3))[:, None], flat, functional.normalize(round_, dim=1)) @ turn
    normal = torch.cat((smooth, torch.zeros(len(smooth), 1)), 1)
    normal[top] = torch.tensor([0.0, 0.0, 1.0])
    return torch.where((enter < leave) & (enter > 1e-3), enter, torch.inf), normal


def _first(origin: Tensor, ray: Tensor, bodies: list[Prism]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distance to the first body (P,), its index or -1 (P,), and the normal there (P,3)."""
    way, which = torch.full((len(ray),), torch.inf), torch.full((len(ray),), -1)
    normal = torch.tensor([0.0, 0.0, 1.0]).repeat(len(ray), 1)
    for k, body in enumerate(bodies):
        middle = torch.tensor([*body.foot[:2], body.foot[2] + body.height / 2])
        # Only rays that pass close to the middle of the body are tested.
        apart = torch.linalg.cross(ray, middle - origin).square().sum(1) / ray.square().sum(1)
        near = (apart < 2 * body.half**2 + (body.height / 2) ** 2).nonzero()[:, 0]
        t, n = _hit(origin[near], ray[near], body)
        closer = t < way[near]
        near = near[closer]
        way[near], which[near], normal[near] = t[closer], k, n[closer]
    return way, which, normal


def picture(bodies: list[Prism], spec: Spec, frame: int, size: int) -> Tensor:
    """Render one frame (3,H,W) in [0,1] of bodies with the camera, light and ground of a scene."""
    position, rotation = camera_path(spec, frame, frame + 1)
    ray = torch.stack(camera_rays(rotation, size, _SUPERSAMPLE), -1)[0]
    origin = position.expand(len(ray), 3)
    way, which, normal = _first(origin, ray, bodies)
    # Intersect the rays with the bodies and the floor; the nearer hit counts.
    down = ray[:, 2] < -1e-4
    floor = torch.where(down, -origin[:, 2] / ray[:, 2].clamp_max(-1e-4), torch.inf)
    body = way < floor
    t = torch.minimum(way, floor).clamp_max(1e3)
    normal = torch.where(body[:, None], normal, torch.tensor([0.0, 0.0, 1.0]))
    # Shade the hit points: ambient light, and direct light outside of shadows.
    azimuth, elevation = spec.light
    light = torch.tensor(
        [
            math.cos(azimuth) * math.cos(elevation),
            math.sin(azimuth) * math.cos(elevation),
            math.sin(elevation),
        ]
    )
    point = origin + t[:, None] * ray + 2e-3 * normal
    dark = _first(point, light.expand(len(ray), 3), bodies)[0] < torch.inf
    lit = torch.where(dark, 0.0, (normal @ light).clamp_min(0))
    shade = 0.42 * (0.8 + 0.2 * normal[:, 2]) + 0.68 * lit
    albedo = torch.tensor([BACKGROUNDS[spec.background], *(b.rgb for b in bodies)])[torch.where(body, which + 1, 0)]
    # Blend the floor into the sky with the distance.
    far = (-((t / 26) ** 2)).exp()[:, None]
    sky = torch.tensor([0.76, 0.79, 0.82])
    rgb = albedo * shade[:, None]
    rgb = torch.where(body[:, None], rgb, sky + (rgb - sky) * far)
    n = size * _SUPERSAMPLE
    return functional.avg_pool2d(rgb.clamp(0, 1).T.reshape(3, n, n), _SUPERSAMPLE)


def corners(rng: random.Random, near: int) -> tuple[float, float, float, float]:
    """Draw the roundness of the corners of a body; corner `near` is the one nearest to the camera."""
    kind = rng.choice(("edged",) * 4 + ("drum",) * 3 + ("front", "side", "back", "corner", "between"))
    if kind in ("edged", "drum"):
        r = rng.uniform(0.0, 0.08) if kind == "edged" else rng.uniform(0.6, 1.0)
        return r, r, r, r
    table = [rng.uniform(0.0, 0.15) for _ in range(4)]
    towards = {"front": (0, rng.choice((1, 3))), "side": (0, 1, 3), "back": (2, rng.choice((1, 3))), "corner": (0,)}
    for k in towards.get(kind, ()):
        table[(near + k) % 4] = rng.uniform(0.7, 1.0)
    if kind == "between":
        table = [rng.uniform(0.0, 0.7) for _ in range(4)]
    return table[0], table[1], table[2], table[3]


def plain(rng: random.Random, frames: int) -> Spec:
    """Draw camera, light and ground of a scene; its body is a placeholder and is not rendered."""
    camera = rng.choice(("static",) * 6 + ("pan left", "orbit left", "orbit right", "dolly in", "dolly out"))
    amount = {"pan": 0.1, "orbit": 0.4, "dolly": 0.2}.get(camera.split()[0], 0.0)
    return Spec(
        bodies=(Body(colour="red", shape="ball"),),
        camera=camera,
        camera_amount=amount,
        background=rng.choice(list(BACKGROUNDS)),
        light=(rng.uniform(-2.4, -0.7), rng.uniform(0.75, 1.2)),
        num_frames=frames,
    )
