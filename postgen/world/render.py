"""Pictures of a scene on any device: RGB, metric depth, instance ids, exact optical flow and camera poses.

CPU and GPU run the same code. A clip is a pure function of its spec, and a spec is a pure function of its seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError

from .camera import FOCAL, camera_path, intrinsics
from .physics import Motion, Simulation
from .raycast import BACKDROP, FAR, FLOOR, Solids, camera_rays, nearest, normals
from .spec import BACKGROUNDS, COLOURS, SHAPES, Spec

_BACKDROP_TOP = (0.80, 0.84, 0.88)
_BACKDROP_LOW = (0.72, 0.74, 0.76)
_AMBIENT, _DIFFUSE = 0.42, 0.68
# Number of (ray, body) pairs per pass: small on a CPU for its caches, large on a GPU to hide launch overhead.
_RAYS_AT_ONCE = {"cpu": 24_000_000, "cuda": 160_000_000}


@dataclass(slots=True)
class Frames:
    """Output of the renderer for B scenes and F frames. Flow has F-1 frames; `None` stands for outputs not requested.

    rgb_BF3HW: float32 in [0,1]. depth_BFHW: metres along the optical axis, `inf` at the backdrop. ids_BFHW: uint8, 0
    for floor and backdrop, k + 1 for body k. flow_BF2HW: displacement in pixels (u right, v down) from a frame to the
    next, exact at every pixel centre even if the target is hidden. pose_BF34: world-to-camera rotation (right, down,
    forward) and position. positions_BFK3: centres of the bodies in metres. contact_BFK: as in `physics.Motion`.

    The properties are computed from these tensors at each access: `disparity_BFHW`, `points_BF3HW`, `texels_BF2HW`,
    `extrinsics_BF44`, `intrinsics_33`.
    """

    rgb_BF3HW: Tensor
    positions_BFK3: Tensor
    pose_BF34: Tensor
    contact_BFK: Tensor
    depth_BFHW: Tensor | None = None
    ids_BFHW: Tensor | None = None
    flow_BF2HW: Tensor | None = None

    @property
    def disparity_BFHW(self) -> Tensor:
        """1 / depth in 1/m, 0 at the backdrop.

        Raises:
            UserError: frames without geometry; `points_BF3HW` and `texels_BF2HW` raise it too.
        """
        return self._depth().reciprocal()

    @property
    def points_BF3HW(self) -> Tensor:
        """World coordinates in metres of the point that each pixel centre sees; NaN at the backdrop."""
        depth = self._depth()
        pose = self.pose_BF34.flatten(0, 1)
        ray = camera_rays(pose[..., :3], depth.shape[-1], 1)
        flat = depth.flatten(0, 1).flatten(1)
        flat = torch.where(flat.isfinite(), flat, torch.nan)
        points = torch.stack([pose[:, i, 3:] + flat * ray[i] for i in range(3)], 1)
        return points.reshape(*depth.shape[:2], 3, *depth.shape[2:])

    @property
    def texels_BF2HW(self) -> Tensor:
        """Place on the floor, (x, y) in metres, that each pixel centre sees; NaN at bodies and at the backdrop.

        The floor does not move, so a place has the same coordinates in every frame, up to rounding.
        """
        points = self.points_BF3HW[:, :, :2]
        assert self.ids_BFHW is not None
        return torch.where((self.ids_BFHW == 0)[:, :, None], points, torch.nan)

    @property
    def extrinsics_BF44(self) -> Tensor:
        """World-to-camera matrices [R, t; 0, 1] with t = -R position: x right, y down, z forward."""
        rotation, position = self.pose_BF34[..., :3], self.pose_BF34[..., 3:]
        top = torch.cat((rotation, -rotation @ position), -1)
        last = top.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*top.shape[:2], 1, 4)
        return torch.cat((top, last), 2)

    @property
    def intrinsics_33(self) -> Tensor:
        """Intrinsic matrix K of every frame, in pixels; pixel centres lie at half-integer coordinates."""
        return intrinsics(self.rgb_BF3HW.shape[-1]).to(self.rgb_BF3HW.device)

    def _depth(self) -> Tensor:
        if self.depth_BFHW is None:
            raise UserError("These frames hold no geometry: render them with geometry=True.")
        return self.depth_BFHW


def render(
    specs: Sequence[Spec],
    *,
    num_frames: int | None = None,
    size: int = 96,
    supersample: int = 2,
    geometry: bool = True,
    device: torch.device | str = "cpu",
    motion: Motion | None = None,
) -> Frames:
    """Render the first frames of several scenes at once.

    Args:
        specs: scenes; scenes with fewer bodies are padded.
        num_frames: length of all clips; default: the planned length of the first spec.
        size: height and width in pixels.
        supersample: rays per pixel along each axis, for antialiasing; 1 means no antialiasing.
        geometry: also return depth, ids and flow, which takes one more pass with one ray per pixel.
        device: device of the computation and of the result.
        motion: replaces the motion that the specs describe, to show impossible events; on the device, one row per
            scene, with at least as many frames and body slots as are rendered.

    Raises:
        UserError: no spec, specs with different frame rates, or a size, length or supersample below 1.
    """
    if min(size, supersample, 1 if num_frames is None else num_frames) < 1:
        raise UserError(f"size={size}, num_frames={num_frames}, supersample={supersample}: each must be at least 1.")
    simulation = Simulation(specs, device)
    frames = num_frames or specs[0].num_frames
    motion = simulation.run(frames) if motion is None else motion.first(frames)
    return _render_motion(specs, motion, 0, size, supersample, geometry, device)


def stream(
    spec: Spec | Sequence[Spec],
    num_frames: int | None,
    *,
    size: int = 96,
    supersample: int = 2,
    chunk: int = 16,
    geometry: bool = True,
    device: torch.device | str = "cpu",
) -> Iterator[Frames]:
    """Render scenes of any length in pieces, with constant memory and constant time per frame.

    The concatenated pieces equal `render` of the whole clip, including the flow between pieces: the first flow field
    of a later piece belongs to the last frame of the previous piece, so a later piece has as many flow fields as
    frames.

    Args:
        spec: a scene, or several scenes that are rendered side by side.
        num_frames: length; None yields pieces without end.
        size, supersample, geometry, device: as in `render`.
        chunk: largest number of frames per piece.

    Raises:
        UserError: no spec, or a number below 1.
    """
    if min(chunk, size, supersample, 1 if num_frames is None else num_frames) < 1:
        raise UserError(
            f"num_frames={num_frames} and chunk={chunk} must be at least 1, and so must {size=} and {supersample=}."
        )
    specs = [spec] if isinstance(spec, Spec) else list(spec)
    simulation = Simulation(specs, device)
    last: Motion | None = None
    for start in itertools.count(0, chunk) if num_frames is None else range(0, num_frames, chunk):
        count = chunk if num_frames is None else min(chunk, num_frames - start)
        motion = simulation.run(count)
        joined = motion if last is None else _join(last, motion)
        frames = _render_motion(specs, joined, start - (last is not None), size, supersample, geometry, device)
        yield frames if last is None else _without_first(frames)
        last = Motion(motion.positions_BFK3[:, -1:], motion.rotations_BFK33[:, -1:], motion.contact_BFK[:, -1:])


def shades(colours: Sequence[str] = tuple(COLOURS), count: int = 8) -> Tensor:
    """Return RGB (C, count, 3) of named colours, from the darkest to the brightest shade under the light of the world.

    The pixels of a body in a rendered picture lie near the shades of its colour.
    """
    darkest, brightest = _AMBIENT * 0.6, _AMBIENT + _DIFFUSE
    light = torch.linspace(darkest, brightest, count)
    albedo = torch.tensor([COLOURS[name] for name in colours])
    return (albedo[:, None] * light[:, None]).clamp(0, 1)


def ground_shades(background: str, count: int = 8) -> Tensor:
    """Return RGB (2 * count + 2, 3) of everything except bodies in front of a background.

    These are the floor from shadow to light, near and half in the haze, and the two ends of the backdrop. A pixel that
    is nearer to one of them than to any of `shades` does not belong to a body.

    Raises:
        UserError: an unknown background.
    """
    if background not in BACKGROUNDS:
        raise UserError(f"Unknown background {background!r}. Known: {', '.join(BACKGROUNDS)}.")
    light = torch.linspace(0.9 * _AMBIENT, 1.1 * (_AMBIENT + _DIFFUSE), count)
    near = torch.tensor(BACKGROUNDS[background]) * light[:, None]
    sky = torch.tensor([_BACKDROP_LOW, _BACKDROP_TOP])
    return torch.cat((near, (near + sky[0]) / 2, sky)).clamp(0, 1)


def _join(first: Motion, second: Motion) -> Motion:
    return Motion(
        torch.cat((first.positions_BFK3, second.positions_BFK3), 1),
        torch.cat((first.rotations_BFK33, second.rotations_BFK33), 1),
        torch.cat((first.contact_BFK, second.contact_BFK), 1),
    )


def _without_first(frames: Frames) -> Frames:
    return Frames(
        frames.rgb_BF3HW[:, 1:],
        frames.positions_BFK3[:, 1:],
        frames.pose_BF34[:, 1:],
        frames.contact_BFK[:, 1:],
        None if frames.depth_BFHW is None else frames.depth_BFHW[:, 1:],
        None if frames.ids_BFHW is None else frames.ids_BFHW[:, 1:],
        frames.flow_BF2HW,
    )


def _render_motion(
    specs: Sequence[Spec],
    motion: Motion,
    start: int,
    size: int,
    supersample: int,
    geometry: bool,
    device: torch.device | str,
) -> Frames:
    frames = motion.positions_BFK3.shape[1]
    poses = [camera_path(spec, start, start + frames) for spec in specs]
    # Poses are stacked on the host: one copy to the device instead of two per scene.
    position, rotation = torch.stack([p for p, _ in poses]).to(device), torch.stack([r for _, r in poses]).to(device)
    per_scene = frames * (size * supersample) ** 2 * motion.positions_BFK3.shape[2]
    limit = _RAYS_AT_ONCE.get(torch.device(device).type, _RAYS_AT_ONCE["cpu"])
    batch = max(1, limit // per_scene)
    pieces = []
    for low in range(0, len(specs), batch):
        part = slice(low, low + batch)
        scene = _Scene(specs[part], motion, part, position[part], rotation[part])
        rgb = scene.shade(size, supersample)
        pieces.append((rgb, *scene.geometry(size)) if geometry else (rgb,))
    columns = [torch.cat(column) for column in zip(*pieces, strict=True)]
    pose = torch.cat((rotation, position[..., None]), -1)
    return Frames(columns[0], motion.positions_BFK3, pose, motion.contact_BFK, *columns[1:])


class _Scene:
    """A batch of scenes with F frames each, flattened to M = B * F pictures."""

    def __init__(self, specs: Sequence[Spec], motion: Motion, part: slice, position: Tensor, rotation: Tensor) -> None:
        self.specs, self.frames = specs, position.shape[1]
        self.position, self.rotation = position.flatten(0, 1), rotation.flatten(0, 1)
        self.motion = Motion(motion.positions_BFK3[part], motion.rotations_BFK33[part], motion.contact_BFK[part])
        self.device = position.device
        self.solids = self._solids()

    def _repeat(self, values: Sequence[Any]) -> Tensor:
        """Turn one value per scene (nested lists) into a tensor with one row per picture."""
        return torch.tensor(values, device=self.device).repeat_interleave(self.frames, 0)

    def _solids(self) -> Solids:
        slots = self.motion.positions_BFK3.shape[2]
        shapes = [
            [SHAPES.index(s.bodies[k].shape) if k < len(s.bodies) else -1 for k in range(slots)] for s in self.specs
        ]
        radii = [[s.bodies[k].radius if k < len(s.bodies) else 0.0 for k in range(slots)] for s in self.specs]
        yaws = [[s.bodies[k].yaw if k < len(s.bodies) else 0.0 for k in range(slots)] for s in self.specs]
        members = []
        for shape in range(len(SHAPES)):
            pairs = [
                (b * self.frames + f, k)
                for b, row in enumerate(shapes)
                for k, name in enumerate(row)
                if name == shape
                for f in range(self.frames)
            ]
            table = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).to(self.device)
            members.append((table[:, 0], table[:, 1]))
        centres = self.motion.positions_BFK3.flatten(0, 1)
        return Solids(centres, self._repeat(radii), self._repeat(yaws), self._repeat(shapes), members)

    def _trace(self, size: int, supersample: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return depth, slot (body, FLOOR or BACKDROP), hit point and ray of every pixel."""
        ray = camera_rays(self.rotation, size, supersample)
        ox, oy, oz = (self.position[:, i, None] for i in range(3))
        t, slot = nearest((ox, oy, oz), ray, self.solids)
        floor = torch.where(ray[2] < -1e-4, -oz / ray[2].clamp_max(-1e-4), FAR)
        slot = torch.where(t < floor, slot, torch.where(floor < FAR, FLOOR, BACKDROP))
        t = torch.minimum(t, floor)
        point = (ox + t * ray[0], oy + t * ray[1], oz + t * ray[2])
        return t, slot, point, ray

    def shade(self, size: int, supersample: int) -> Tensor:
        """Return RGB (B,F,3,H,W) in [0,1]: Lambert shading, hard shadows, averages of supersample^2 rays per pixel."""
        t, slot, point, ray = self._trace(size, supersample)
        normal = normals((point[0], point[1], point[2]), slot, self.solids)
        light = self._light()
        facing = normal[0] * light[0] + normal[1] * light[1] + normal[2] * light[2]
        shadow_from = tuple((p + 2e-3 * n).clamp(-1e3, 1e3) for p, n in zip(point, normal, strict=True))
        blocked, _ = nearest((shadow_from[0], shadow_from[1], shadow_from[2]), light, self.solids)
        lit = torch.where(blocked < FAR, 0.0, facing.clamp_min(0))
        shading = _AMBIENT * (0.8 + 0.2 * normal[2]) + _DIFFUSE * lit
        fog = 1.0 - torch.exp(-((t / 26.0) ** 2))
        height = (ray[2] * 4.0 + 0.5).clamp(0, 1)
        pattern = self._floor_pattern(point, t)
        floor, body = self._repeat([list(BACKGROUNDS[s.background]) for s in self.specs]), self._albedo()
        index = slot.clamp_min(0)
        channels = []
        for c in range(3):
            sky = _BACKDROP_LOW[c] + (_BACKDROP_TOP[c] - _BACKDROP_LOW[c]) * height
            ground = floor[:, c, None] * pattern * shading
            ground = ground + (sky - ground) * fog
            solid = body[..., c].gather(1, index) * shading
            channels.append(torch.where(slot >= 0, solid, torch.where(slot == FLOOR, ground, sky)))
        n = size * supersample
        rgb = torch.stack(channels, 1).reshape(-1, 3, n, n).clamp(0, 1)
        if supersample > 1:
            rgb = torch.nn.functional.avg_pool2d(rgb, supersample)
        clips: Tensor = rgb.unflatten(0, (-1, self.frames))
        return clips

    def _light(self) -> tuple[Tensor, Tensor, Tensor]:
        table = self._repeat([list(s.light) for s in self.specs])
        azimuth, elevation = table[:, :1], table[:, 1:]
        return azimuth.cos() * elevation.cos(), azimuth.sin() * elevation.cos(), elevation.sin()

    def _albedo(self) -> Tensor:
        slots = self.motion.positions_BFK3.shape[2]
        black = (0.0, 0.0, 0.0)
        return self._repeat(
            [[COLOURS[s.bodies[k].colour] if k < len(s.bodies) else black for k in range(slots)] for s in self.specs]
        )

    def _floor_pattern(self, point: tuple[Tensor, ...], t: Tensor) -> Tensor:
        """Return the brightness factor of the floor, which fades with distance to avoid aliasing at the horizon."""
        phase = self._repeat([list(s.floor_phase) for s in self.specs])
        x, y = point[0].clamp(-60, 60), point[1].clamp(-60, 60)
        fade = 0.09 * torch.exp(-((t / 13.0) ** 2))
        return 1.0 + fade * torch.sin(1.1 * x + phase[:, :1]) * torch.sin(0.9 * y + phase[:, 1:])

    def geometry(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return depth (B,F,H,W), ids (B,F,H,W) uint8 and flow (B,F-1,2,H,W) at pixel centres."""
        t, slot, point, ray = self._trace(size, 1)
        scenes, shape = len(self.specs), (-1, self.frames, size, size)
        depth = torch.where(slot == BACKDROP, torch.inf, t).reshape(shape)
        ids = (slot + 1).clamp_min(0).to(torch.uint8).reshape(shape)
        if self.frames == 1:
            return depth, ids, depth.new_zeros((scenes, 0, 2, size, size))
        moved = self._carried(torch.stack(point, -1), slot)
        rotation = self.rotation.unflatten(0, (scenes, self.frames))
        position = self.position.unflatten(0, (scenes, self.frames))
        offset = moved - position[:, 1:, None]
        direction = torch.stack(ray, -1).unflatten(0, (scenes, self.frames))[:, :-1]
        offset = torch.where(
            (slot == BACKDROP).unflatten(0, (scenes, self.frames))[:, :-1, :, None], direction, offset
        )
        seen = torch.einsum("bfij,bfpj->bfpi", rotation[:, 1:], offset)
        pixel = (seen[..., :2] / seen[..., 2:].clamp_min(1e-6) * FOCAL + 1.0) * (size / 2)
        steps = torch.arange(size, device=self.device) + 0.5
        v, u = torch.meshgrid(steps, steps, indexing="ij")
        flow = pixel - torch.stack((u, v), -1).reshape(-1, 2)
        return depth, ids, flow.movedim(-1, 2).unflatten(-1, (size, size))

    def _carried(self, point_MP3: Tensor, slot_MP: Tensor) -> Tensor:
        """Return the position at frame f + 1 of the material point seen at frame f: (B, F-1, P, 3)."""
        scenes = len(self.specs)
        centre, rotation = self.motion.positions_BFK3, self.motion.rotations_BFK33
        point = point_MP3.unflatten(0, (scenes, self.frames))[:, :-1]
        slot = slot_MP.unflatten(0, (scenes, self.frames))[:, :-1]
        turn = rotation[:, 1:] @ rotation[:, :-1].mT
        index = slot.clamp_min(0)[..., None]
        old = centre[:, :-1].gather(2, index.expand(-1, -1, -1, 3))
        new = centre[:, 1:].gather(2, index.expand(-1, -1, -1, 3))
        turn_P = turn.flatten(-2).gather(2, index.expand(-1, -1, -1, 9)).unflatten(-1, (3, 3))
        carried = new + (turn_P @ (point - old)[..., None])[..., 0]
        return torch.where((slot >= 0)[..., None], carried, point)
