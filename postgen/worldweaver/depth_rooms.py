"""Render random rooms with exact disparity, so that a depth network trained on the world also handles real pictures.

A room has spheres, boxes and cylinders of `postgen.world.raycast`, stretched and rotated by linear maps, on a floor
between walls. Surfaces wear patterns and photos. The camera has any height, angle of view and motion. The variety is a
form of domain randomisation (arXiv:1703.06907): only depth is consistent across rooms. Suffixes: B rooms, F frames,
M pictures (B * F), P rays, G groups of solids with one linear map, K solids of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.world.raycast import FAR, Solids, nearest, normals
from postgen.world.spec import HALF_HEIGHT, SHAPES

from .depth_textures import Textures

_GROUPS, _SOLIDS = 6, 3
_PLANES = 5
_SURFACES = _PLANES + _GROUPS * _SOLIDS
"""Number of surfaces: floor, three walls, ceiling, solids."""
_FARTHEST = 5e4
"""Distance in metres beyond which a plane counts as absent."""
_AT_ONCE = 24_000_000
"""Number of (ray, solid) pairs per pass on a CPU, chosen for its caches."""


@dataclass(slots=True)
class _Room:
    """Parameters of B rooms. All random numbers are drawn on the CPU, so that rooms are equal on every device."""

    eye_BF3: Tensor
    look_BF33: Tensor
    focal_B: Tensor
    planes_B54: Tensor
    maps_BG33: Tensor
    centres_BFGK3: Tensor
    radius_BGK: Tensor
    shape_BGK: Tensor
    light_B3: Tensor
    texture_BS: Tensor
    scale_BS: Tensor
    colour_BS3: Tensor
    pattern_BS: Tensor
    fog_B: Tensor


class _Draw:
    """Draws random numbers from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def within(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def normal(self, spread: float, *shape: int) -> Tensor:
        return spread * torch.randn(shape, generator=self.generator)

    def happens(self, chance: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < chance


def rooms(
    count: int,
    frames: int,
    size: int,
    textures: Textures,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Draw and render rooms.

    Args:
        count, frames, size: number of rooms, frames of each room, height and width in pixels.
        textures: textures for the surfaces.
        generator: CPU generator.
        device: device on which to render.

    Returns:
        Pictures (B,F,3,H,W) uint8, and disparity (B,F,H,W) float16 in 1/m, 0 where there is no surface.
    """
    room = _draw(_Draw(generator), count, frames, len(textures))
    each = frames * (2 * size) ** 2 * _GROUPS * _SOLIDS
    # Large passes on a GPU (few kernel launches), small passes on a CPU (cache size).
    step = max(1, (_AT_ONCE if torch.device(device).type == "cpu" else 20 * _AT_ONCE) // each)
    parts = []
    for low in range(0, count, step):
        part = _Room(*(getattr(room, name)[low : low + step].to(device) for name in _Room.__dataclass_fields__))
        rgb = torch.nn.functional.avg_pool2d(_render(part, 2 * size, textures)[0], 2)
        disparity = _render(part, size, None)[1]
        as_bytes = (rgb.clamp(0, 1) * 255).round().to(torch.uint8)
        parts.append((as_bytes.unflatten(0, (-1, frames)), disparity.half().unflatten(0, (-1, frames))))
    pictures, disparities = zip(*parts, strict=True)
    return torch.cat(pictures), torch.cat(disparities)


def _draw(draw: _Draw, count: int, frames: int, textures: int) -> _Room:
    focal = draw.within(1.2, 3.2, count)
    depth = draw.within(2.5, 9.0, count)
    eye, look = _camera(draw, count, frames)
    maps, upright = _maps(draw, count)
    radius = draw.within(0.06, 0.65, count, _GROUPS, _SOLIDS) * (depth / 6)[:, None, None]
    shape = torch.randint(len(SHAPES), (count, _GROUPS, _SOLIDS), generator=draw.generator)
    centres = _places(draw, maps, upright, radius, shape, focal, depth)
    drift = draw.normal(0.05, count, 1, _GROUPS, _SOLIDS, 3) * draw.happens(0.4, count, 1, _GROUPS, _SOLIDS, 1)
    drift = drift * torch.tensor([1.0, 1.0, 0.2]) * torch.arange(frames).view(1, -1, 1, 1, 1)
    light = torch.nn.functional.normalize(draw.normal(1.0, count, 3) + torch.tensor([0.0, -0.6, 1.4]), dim=-1)
    surfaces = (count, _SURFACES)
    return _Room(
        eye,
        look,
        focal,
        _planes(draw, count, depth),
        maps,
        centres[:, None] + drift,
        radius,
        shape,
        light,
        torch.randint(textures, surfaces, generator=draw.generator),
        draw.normal(0.6, *surfaces).exp(),
        draw.within(0.05, 1.0, *surfaces, 3),
        draw.within(0.0, 1.3, *surfaces).clamp_max(1),
        draw.within(0.0, 0.5, count) * draw.happens(0.3, count) / depth,
    )


def _camera(draw: _Draw, count: int, frames: int) -> tuple[Tensor, Tensor]:
    """Return camera positions (B,F,3) and rotations to right, down, forward (B,F,3,3). Half of the cameras move."""
    time = torch.arange(frames).float()[None]
    moves = draw.happens(0.5, count, 1).float()
    eye = torch.zeros(count, frames, 3)
    eye[..., 2] = draw.within(0.4, 2.4, count, 1)
    eye = eye + moves[..., None] * draw.normal(0.05, count, 1, 3) * torch.tensor([1.0, 1.0, 0.3]) * time[..., None]
    pitch = draw.within(-0.05, 0.55, count, 1) * (eye[:, :1, 2] / 1.4).clamp_max(1.2)
    pitch = pitch + moves * draw.normal(0.006, count, 1) * time
    yaw = moves * draw.normal(0.012, count, 1) * time
    roll = draw.normal(0.03, count, 1).expand(-1, frames)
    zero = torch.zeros_like(yaw)
    forward = torch.stack((yaw.sin() * pitch.cos(), yaw.cos() * pitch.cos(), -pitch.sin()), -1)
    right = torch.stack((yaw.cos(), -yaw.sin(), zero), -1)
    down = torch.linalg.cross(forward, right)
    cos, sin = roll.cos()[..., None], roll.sin()[..., None]
    return eye, torch.stack((cos * right + sin * down, cos * down - sin * right, forward), -2)


def _maps(draw: _Draw, count: int) -> tuple[Tensor, Tensor]:
    """Return linear maps (B,G,3,3) to the space in which solids are round, and whether the maps keep the vertical."""
    upright = draw.happens(0.65, count, _GROUPS)
    turn = torch.linalg.qr(draw.normal(1.0, count, _GROUPS, 3, 3)).Q
    angle = draw.within(0, 2 * math.pi, count, _GROUPS)
    flat = torch.zeros(count, _GROUPS, 3, 3)
    flat[..., 0, 0] = flat[..., 1, 1] = angle.cos()
    flat[..., 0, 1], flat[..., 1, 0], flat[..., 2, 2] = -angle.sin(), angle.sin(), 1.0
    stretch = draw.normal(0.65, count, _GROUPS, 3).exp()
    return stretch[..., None] * torch.where(upright[..., None, None], flat, turn), upright


def _places(
    draw: _Draw, maps: Tensor, upright: Tensor, radius: Tensor, shape: Tensor, focal: Tensor, depth: Tensor
) -> Tensor:
    """Return centres (B,G,K,3) of the solids in the room. Centres are in view; most solids stand on the floor."""
    many = radius.shape
    far = depth.view(-1, 1, 1) * draw.within(0.25, 1.0, *many)
    side = draw.within(-1.1, 1.1, *many) * far / focal.view(-1, 1, 1)
    tall = torch.tensor([HALF_HEIGHT[name] for name in SHAPES])[shape] * radius / maps[..., 2, 2, None]
    above = draw.within(0.1, 2.0, *many)
    stands = upright[..., None] & draw.happens(0.9, *many)
    return torch.stack((side, far, torch.where(stands, tall, above)), -1)


def _planes(draw: _Draw, count: int, depth: Tensor) -> Tensor:
    """Return floor, back wall, left wall, right wall and ceiling as unit normal into the room and offset (B,5,4).

    Some planes are absent: they are placed beyond `_FARTHEST`.
    """
    turn = draw.within(-0.5, 0.5, count)
    zero, one = torch.zeros(count), torch.ones(count)
    back = torch.stack((turn.sin(), -turn.cos(), zero), -1)
    side = torch.stack((turn.cos(), turn.sin(), zero), -1)
    up = torch.stack((zero, zero, one), -1)
    gone = -1e5
    offsets = torch.stack(
        (
            zero,
            torch.where(draw.happens(0.85, count), -depth, gone),
            torch.where(draw.happens(0.5, count), -draw.within(1.2, 5.0, count), gone),
            torch.where(draw.happens(0.5, count), -draw.within(1.2, 5.0, count), gone),
            torch.where(draw.happens(0.4, count), -draw.within(2.6, 4.0, count), gone),
        ),
        -1,
    )
    return torch.cat((torch.stack((up, back, side, -side, -up), 1), offsets[..., None]), -1)


def _solids(room: _Room, group: int) -> Solids:
    """Return the solids of a group in the space of its linear map, one row per picture."""
    frames = room.eye_BF3.shape[1]
    shape = room.shape_BGK[:, group].repeat_interleave(frames, 0)
    centre = (room.centres_BFGK3[:, :, group] @ room.maps_BG33[:, None, group].mT).flatten(0, 1)
    radius = room.radius_BGK[:, group].repeat_interleave(frames, 0)
    places = [(shape == k).nonzero() for k in range(len(SHAPES))]
    members = [(place[:, 0], place[:, 1]) for place in places]
    return Solids(centre, radius, torch.zeros_like(radius), shape, members)


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return the scalar product of vectors that are given as three component tensors each."""
    return first[0] * second[0] + first[1] * second[1] + first[2] * second[2]


def _mapped(matrix_M33: Tensor, vectors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    rows = [_dot([matrix_M33[:, i, j, None] for j in range(3)], vectors) for i in range(3)]
    return rows[0], rows[1], rows[2]


class _Hits:
    """First hits of rays: depth, surface number, normal in the room, and texture coordinates on the surface."""

    def __init__(self, room: _Room, origin: tuple[Tensor, ...], ray: tuple[Tensor, ...], *, shaded: bool) -> None:
        frames = room.eye_BF3.shape[1]
        self.t = torch.full_like(ray[0] + origin[0], FAR)
        self.surface = torch.full_like(self.t, -1, dtype=torch.long)
        self.normal = [torch.zeros_like(self.t) for _ in range(3)]
        self.place = [torch.zeros_like(self.t) for _ in range(2)]
        o, d = (origin[0], origin[1], origin[2]), (ray[0], ray[1], ray[2])
        for k in range(_PLANES):
            plane = room.planes_B54[:, k].repeat_interleave(frames, 0)
            out = [plane[:, i, None] for i in range(3)]
            towards, above = _dot(out, d), _dot(out, o) - plane[:, 3, None]
            t = torch.where(towards < -1e-4, -above / towards.clamp_max(-1e-4), FAR)
            closer = t < self.t.clamp_max(_FARTHEST)
            if shaded:
                self._wear_plane(closer, [a + t * b for a, b in zip(o, d, strict=True)], plane[:, :3])
            self._take(closer, t, k)
        for group in range(_GROUPS):
            matrix = room.maps_BG33[:, group].repeat_interleave(frames, 0)
            solids = _solids(room, group)
            own_o, own_d = _mapped(matrix, o), _mapped(matrix, d)
            t, slot = nearest(own_o, own_d, solids)
            closer = t < self.t
            if shaded:
                point = [a + t * b for a, b in zip(own_o, own_d, strict=True)]
                self._wear_solid(closer, point, slot, solids, matrix)
            self._take(closer, t, _PLANES + group * _SOLIDS + slot)

    def _take(self, closer: Tensor, t: Tensor, surface: Tensor | int) -> None:
        self.t = torch.where(closer, t, self.t)
        self.surface = torch.where(closer, surface, self.surface)

    def _wear_plane(self, closer: Tensor, point: list[Tensor], normal: Tensor) -> None:
        along = normal[:, 0, None] * point[1] - normal[:, 1, None] * point[0]
        flat = normal[:, 2:].abs() > 0.5
        for i, value in enumerate((torch.where(flat, point[0], along), torch.where(flat, point[1], point[2]))):
            self.place[i] = torch.where(closer, value, self.place[i])
        for i in range(3):
            self.normal[i] = torch.where(closer, normal[:, i, None], self.normal[i])

    def _wear_solid(self, closer: Tensor, point: list[Tensor], slot: Tensor, solids: Solids, matrix: Tensor) -> None:
        own = normals((point[0], point[1], point[2]), slot, solids)
        index = slot.clamp_min(0)
        local = [p - solids.centre_MK3[..., i].gather(1, index) for i, p in enumerate(point)]
        size = [axis.abs() for axis in own]
        first = (size[0] >= size[1]) & (size[0] >= size[2])
        top = size[2] > size[1]
        u = torch.where(first, local[1], local[0])
        v = torch.where(~first & top, local[1], local[2])
        self.place = [torch.where(closer, new, old) for new, old in zip((u, v), self.place, strict=True)]
        # Normals transform with the transposed map.
        turned = torch.stack(_mapped(matrix.mT, own))
        turned = turned / turned.norm(dim=0).clamp_min(1e-6)
        self.normal = [torch.where(closer, turned[i], self.normal[i]) for i in range(3)]


def _render(room: _Room, size: int, textures: Textures | None) -> tuple[Tensor, Tensor]:
    """Return pictures (M,3,size,size), empty if `textures` is None, and disparity (M,size,size)."""
    frames = room.eye_BF3.shape[1]
    steps = (torch.arange(size, device=room.focal_B.device) + 0.5) * (2.0 / size) - 1.0
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    focal = room.focal_B.repeat_interleave(frames)[:, None]
    look, eye = room.look_BF33.flatten(0, 1), room.eye_BF3.flatten(0, 1)
    ray = _mapped(look.mT, (u.reshape(1, -1) / focal, v.reshape(1, -1) / focal, torch.ones_like(focal)))
    origin = tuple(eye[:, i, None] for i in range(3))
    hits = _Hits(room, origin, ray, shaded=textures is not None)
    disparity = torch.where(hits.surface >= 0, 1 / hits.t, 0.0).unflatten(1, (size, size))
    if textures is None:
        return disparity.new_empty(0), disparity
    rgb = _shade(room, hits, origin, ray, textures, size)
    return rgb.unflatten(-1, (size, size)), disparity


def _shade(
    room: _Room, hits: _Hits, origin: tuple[Tensor, ...], ray: tuple[Tensor, ...], textures: Textures, size: int
) -> Tensor:
    """Return RGB (M,3,P): textured surfaces under one light with hard shadows, and haze in some rooms."""
    frames = room.eye_BF3.shape[1]
    surface = hits.surface.clamp_min(0)

    def of_surface(values_BS: Tensor) -> Tensor:
        return values_BS.repeat_interleave(frames, 0).gather(1, surface)

    focal = room.focal_B.repeat_interleave(frames)[:, None]
    scale = of_surface(room.scale_BS)
    # Length on the surface that one pixel of the picture covers; larger at a grazing angle.
    facing = _dot(hits.normal, ray).abs().clamp_min(0.15)
    covered = scale * hits.t.clamp_max(_FARTHEST) * 2 / (focal * size * facing)
    worn = textures.look_up(of_surface(room.texture_BS), hits.place[0] * scale, hits.place[1] * scale, covered)
    light = room.light_B3.repeat_interleave(frames, 0)
    towards = tuple(light[:, i, None] for i in range(3))
    lit = _dot(hits.normal, towards).clamp_min(0)
    start = tuple(
        (o + hits.t.clamp_max(_FARTHEST) * d + 2e-3 * n) for o, d, n in zip(origin, ray, hits.normal, strict=True)
    )
    blocked = _Hits(room, start, tuple(way.expand_as(hits.t) for way in towards), shaded=False)
    lit = torch.where(blocked.surface >= _PLANES, 0.0, lit)
    shading, pattern = 0.45 + 0.65 * lit, of_surface(room.pattern_BS)
    haze = 1 - torch.exp(-hits.t.clamp_max(_FARTHEST) * room.fog_B.repeat_interleave(frames)[:, None])
    channels = []
    for c in range(3):
        plain = of_surface(room.colour_BS3[..., c])
        colour = (plain + (worn[c] - plain) * pattern) * shading
        sky = 0.75 + 0.1 * c / 2
        channels.append(torch.where(hits.surface >= 0, colour + (sky - colour) * haze, sky))
    return torch.stack(channels, 1)
