"""Analytic ray casting of spheres, upright boxes and upright cylinders above a floor, batched in plain torch.

Suffixes: M pictures, P rays per picture, K body slots, N (picture, body) pairs of one shape. The direction of a ray
has forward component 1, so the ray parameter t is the depth along the optical axis. Shapes are looked up on the host,
so that no step waits for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .camera import FOCAL
from .spec import HALF_HEIGHT, HALF_WIDTH, SHAPES

FAR = 1.0e6
FLOOR, BACKDROP = -1, -2


@dataclass(slots=True)
class Solids:
    """Geometry of the bodies in M pictures.

    `members`: for each shape, the picture indices and slot indices, each (N,), of the bodies with this shape.
    """

    centre_MK3: Tensor
    radius_MK: Tensor
    yaw_MK: Tensor
    shape_MK: Tensor
    members: list[tuple[Tensor, Tensor]]


def camera_rays(rotation_M33: Tensor, size: int, supersample: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the world directions (x, y, z) of rays through the centres of the sub-pixels.

    Each of the three has the shape (M, P) with P = (size * supersample)^2.
    """
    n = size * supersample
    steps = (torch.arange(n, device=rotation_M33.device, dtype=torch.float32) + 0.5) * (2.0 / n) - 1.0
    v, u = torch.meshgrid(steps / FOCAL, steps / FOCAL, indexing="ij")
    local = torch.stack((u.reshape(-1), v.reshape(-1), torch.ones(n * n, device=u.device)), -1)
    world = torch.einsum("mij,pi->jmp", rotation_M33, local)
    return world[0], world[1], world[2]


def nearest(
    origin: tuple[Tensor, Tensor, Tensor], ray: tuple[Tensor, Tensor, Tensor], solids: Solids
) -> tuple[Tensor, Tensor]:
    """Return the first hit of every ray: the depth t (M,P), `FAR` without a hit, and the body slot (M,P), or -1.

    Args:
        origin: start points (x, y, z), each (M,1) or (M,P).
        ray: directions (x, y, z), each (M,P) or (M,1).
        solids: the bodies.
    """
    slots = solids.radius_MK.shape[1]
    pictures = solids.radius_MK.shape[0]
    rays = max(ray[0].shape[1], origin[0].shape[1])
    depth = ray[0].new_full((pictures, slots, rays), FAR)
    for shape, (picture_N, slot_N) in zip(SHAPES, solids.members, strict=True):
        if len(picture_N):
            depth[picture_N, slot_N] = _hit(shape, origin, ray, solids, picture_N, slot_N)
    t, slot = depth.min(dim=1)
    return t, torch.where(t < FAR, slot, FLOOR)


def _hit(
    shape: str,
    origin: tuple[Tensor, Tensor, Tensor],
    ray: tuple[Tensor, Tensor, Tensor],
    solids: Solids,
    picture_N: Tensor,
    slot_N: Tensor,
) -> Tensor:
    centre = solids.centre_MK3[picture_N, slot_N]
    radius = solids.radius_MK[picture_N, slot_N][:, None]
    ox, oy, oz = (o[picture_N] - centre[:, i, None] for i, o in enumerate(origin))
    dx, dy, dz = (d[picture_N] for d in ray)
    if shape == "ball":
        return _sphere(ox, oy, oz, dx, dy, dz, radius)
    height, width = radius * HALF_HEIGHT[shape], radius * HALF_WIDTH[shape]
    if shape == "cylinder":
        return _cylinder(ox, oy, oz, dx, dy, dz, width, height)
    yaw = solids.yaw_MK[picture_N, slot_N][:, None]
    cos, sin = yaw.cos(), yaw.sin()
    ox, oy, dx, dy = cos * ox + sin * oy, cos * oy - sin * ox, cos * dx + sin * dy, cos * dy - sin * dx
    return _box((ox, oy, oz), (dx, dy, dz), (width, width, height))


def _front(near: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid & (near > 1e-3), near, FAR)


def _sphere(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor, radius: Tensor) -> Tensor:
    a = dx * dx + dy * dy + dz * dz
    b = dx * ox + dy * oy + dz * oz
    c = ox * ox + oy * oy + oz * oz - radius * radius
    discriminant = b * b - a * c
    return _front((-b - discriminant.clamp_min(0).sqrt()) / a, discriminant > 0)


def _safe(direction: Tensor) -> Tensor:
    return torch.where(direction.abs() < 1e-9, 1e-9, direction)


def _slab(origin: Tensor, direction: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    inverse = _safe(direction).reciprocal()
    first, second = (-half - origin) * inverse, (half - origin) * inverse
    return torch.minimum(first, second), torch.maximum(first, second)


def _box(origin: tuple[Tensor, ...], direction: tuple[Tensor, ...], half: tuple[Tensor, ...]) -> Tensor:
    slabs = [_slab(o, d, h) for o, d, h in zip(origin, direction, half, strict=True)]
    near = torch.maximum(torch.maximum(slabs[0][0], slabs[1][0]), slabs[2][0])
    far = torch.minimum(torch.minimum(slabs[0][1], slabs[1][1]), slabs[2][1])
    return _front(near, near < far)


def _cylinder(
    ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor, radius: Tensor, half: Tensor
) -> Tensor:
    a = (dx * dx + dy * dy).clamp_min(1e-9)
    b = dx * ox + dy * oy
    discriminant = b * b - a * (ox * ox + oy * oy - radius * radius)
    root = discriminant.clamp_min(0).sqrt()
    near_z, far_z = _slab(oz, dz, half)
    near = torch.maximum((-b - root) / a, near_z)
    far = torch.minimum((-b + root) / a, far_z)
    return _front(near, (discriminant > 0) & (near < far))


def normals(point: tuple[Tensor, Tensor, Tensor], slot_MP: Tensor, solids: Solids) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outward unit normals (x, y, z), each (M,P), at hit points on the bodies.

    The normal points up where `slot_MP` is negative.
    """
    index = slot_MP.clamp_min(0)
    cx, cy, cz = (solids.centre_MK3[..., i].gather(1, index) for i in range(3))
    radius = solids.radius_MK.gather(1, index).clamp_min(1e-3)
    yaw = solids.yaw_MK.gather(1, index)
    shape = solids.shape_MK.gather(1, index)
    qx, qy, qz = (point[0] - cx) / radius, (point[1] - cy) / radius, (point[2] - cz) / radius
    cos, sin = yaw.cos(), yaw.sin()
    lx, ly = cos * qx + sin * qy, cos * qy - sin * qx
    ax, ay, az = lx.abs(), ly.abs(), qz.abs()
    on_x, on_z = (ax >= ay) & (ax >= az), (az > ay) & (az > ax)
    bx = torch.where(on_x, lx.sign(), 0.0)
    by = torch.where(on_x | on_z, 0.0, ly.sign())
    box = (cos * bx - sin * by, sin * bx + cos * by, torch.where(on_z, qz.sign(), 0.0))
    cap = az > HALF_HEIGHT["cylinder"] - 1e-3
    side = (qx * qx + qy * qy).sqrt().clamp_min(1e-6)
    tube = (torch.where(cap, 0.0, qx / side), torch.where(cap, 0.0, qy / side), torch.where(cap, qz.sign(), 0.0))
    flat = slot_MP < 0
    up = (0.0, 0.0, 1.0)
    result = []
    for ball, cube, cylinder, floor in zip((qx, qy, qz), box, tube, up, strict=True):
        solid = torch.where(shape == 0, ball, torch.where(shape == 1, cube, cylinder))
        result.append(torch.where(flat, floor, solid))
    return result[0], result[1], result[2]
