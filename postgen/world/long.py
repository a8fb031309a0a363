"""Scenes of any length: bodies move to and fro, as does the camera; bodies hide behind each other or leave and return.

A scene never ends, and bodies never collide: every body has its own lane (along x) or column (along y) between the
walls. So any frame, however late, follows from the first frames.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from postgen.errors import UserError

from .camera import FOCAL, camera_pose, goes_back, project_from
from .grammar import caption, simple_caption
from .physics import SUBSTEPS, WALL_X, WALL_Y
from .spec import BACKGROUNDS, CAMERAS, COLOURS, HALF_WIDTH, SHAPES, SIZES, Body, Spec, Split, is_held_out

HORIZON = 97
"""Number of frames within which the first absence begins and ends."""
LEAST_ABSENCE = 8
"""Smallest length of this absence in frames."""

Absence = Literal["leaves", "hidden"]
Layout = Literal["lanes", "columns"]
_CAMERAS = tuple(name for name in CAMERAS if name != "dolly return")
_TURN = (24, 48)
#: Camera motion per frame (lowest, highest) and largest total motion: radians, or a factor of the distance for dolly.
_RATE = {"pan": (0.008, 0.014, 0.6), "orbit": (0.018, 0.030, 0.9), "dolly": (0.006, 0.009, 0.33)}
_SPEED = {"lanes": (0.6, 1.2), "columns": (0.5, 0.9)}
_OPPOSITE = {"moves left": "moves right", "moves closer": "moves away", "left": "right", "in": "out"}
_OPPOSITE |= {there: back for back, there in _OPPOSITE.items()}
_ROOM = 1.2
"""Distance of two lanes in contact radii; above 1, as the corners of cubes lie outside their contact circle."""
_LARGEST, _SMALLEST = 0.75, 0.1
"""Bounds of the radius of a visible body in half picture heights; the lower one is about 5 px at 96 px."""
_TRIES = 2000


def sample_long(
    seed: int,
    *,
    num_frames: int = 161,
    num_bodies: int | None = None,
    camera: str | None = None,
    absence: Absence | None = None,
    split: Split = "train",
) -> Spec:
    """Draw a scene without an end. The same arguments give the same scene on every machine and at every length.

    At least one body moves, and all bodies are visible in the first frame. Within the first 97 frames at least one
    body is absent for 8 frames or more and comes back. The camera stands still, or moves to and fro between two poses
    in whole frames; its poses recur bit for bit.

    Args:
        seed: any integer.
        num_frames: default length of `render` for this scene, without any other effect: a longer clip begins like a
            shorter one.
        num_bodies: 1 to 3; None draws 2 (60 %), 1 or 3 (20 % each).
        camera: name from `CAMERAS` except "dolly return" (every camera move returns here); None draws "static" in 20
            %.
        absence: "leaves": a body leaves the view and returns, by its own motion or by the camera's. "hidden": a body
            passes behind another one; needs two bodies or more. None draws "leaves" in 60 %, and always for one body.
        split: as in `sample`; a body that turns around counts with both of its directions.

    Raises:
        UserError: an argument outside these ranges.
    """
    _check(num_frames, num_bodies, camera, absence, split)
    rng = random.Random(f"postgen-world-long-{seed}-{num_bodies}-{camera}-{absence}-{split}")
    count = num_bodies or rng.choices((1, 2, 3) if absence != "hidden" else (2, 2, 3), (0.2, 0.6, 0.2))[0]
    kind: Absence = absence or ("leaves" if count == 1 or rng.random() < 0.6 else "hidden")
    move = camera or ("static" if rng.random() < 0.2 else rng.choice(_CAMERAS[1:]))
    for _ in range(_TRIES):
        spec = _with_camera(_bodies(rng, count, move, kind), move, rng, num_frames)
        held = any(is_held_out(b.colour, b.shape, event) for b in spec.bodies for event in _events(b))
        if (split == "all" or held == (split == "held_out")) and _shows(spec, kind):
            return spec
    raise UserError(f"No long scene found for {num_bodies=}, {camera=}, {absence=}, {split=}: try another seed.")


def _check(num_frames: int, num_bodies: int | None, camera: str | None, absence: str | None, split: str) -> None:
    if num_frames < 1:
        raise UserError(f"num_frames must be at least 1, not {num_frames}.")
    if num_bodies is not None and not 1 <= num_bodies <= 3:
        raise UserError(f"num_bodies must be 1, 2 or 3, not {num_bodies}.")
    if camera is not None and camera not in _CAMERAS:
        raise UserError(f"Unknown camera {camera!r} of a long scene. Known: {', '.join(_CAMERAS)}.")
    if absence not in (None, "leaves", "hidden"):
        raise UserError(f"Unknown absence {absence!r}. Known: leaves, hidden.")
    if absence == "hidden" and num_bodies == 1:
        raise UserError("absence='hidden' with num_bodies=1: a body hides behind another one; give num_bodies=2 or 3.")
    if split not in ("train", "held_out", "all"):
        raise UserError(f"Unknown split {split!r}. Known: train, held_out, all.")


def caption_at(spec: Spec, frame: int, seed: int | None = None) -> str:
    """Describe a scene of `sample_long` from a frame on; bodies and camera may have turned around since the first
    frame.

    Args:
        spec: the scene.
        frame: index of the frame, 0 or more.
        seed: seed of the wording, as in `caption`; None uses the wording of `simple_caption`.

    >>> spec = sample_long(3, num_bodies=1, camera="static")
    >>> sorted({caption_at(spec, frame) for frame in range(200)})
    ['a purple ball moves left', 'a purple ball moves right']
    """
    bodies = []
    for body in spec.bodies:
        place, back = _course(body, frame, spec.fps)
        bodies.append(replace(body, position=place, event=_OPPOSITE[body.event] if back else body.event))
    kind, _, way = spec.camera.partition(" ")
    camera = f"{kind} {_OPPOSITE[way]}" if goes_back(spec, frame) else spec.camera
    now = replace(spec, bodies=tuple(bodies), camera=camera)
    return simple_caption(now) if seed is None else caption(now, seed)


def _events(body: Body) -> tuple[str, ...]:
    return (body.event, _OPPOSITE[body.event]) if body.event in _OPPOSITE else (body.event,)


def _bodies(rng: random.Random, count: int, camera: str, kind: Absence) -> list[Body]:
    layout: Layout = "lanes"
    # A camera that dollies would have a body of a column right in front of its lens.
    if kind == "leaves" and not camera.startswith("dolly") and rng.random() < 0.3:
        layout = "columns"
    sizes = [rng.choice(list(SIZES)) for _ in range(count)]
    shapes = [rng.choice(SHAPES) for _ in range(count)]
    speeds = [rng.choice((-1.0, 1.0)) * rng.uniform(*_SPEED[layout]) if rng.random() < 0.7 else 0.0 for _ in sizes]
    mover = rng.randrange(count)
    if kind == "hidden":
        # A large body hides a small one for 8 frames if it stands still or moves in the same direction at a third of
        # the speed.
        mover = rng.randrange(1, count)
        sizes[0], shapes[0], sizes[mover] = "large", rng.choice(("ball", "cube")), "small"
    speeds[mover] = speeds[mover] or rng.choice((-1.0, 1.0)) * rng.uniform(*_SPEED[layout])
    if kind == "hidden":
        speeds[0] = rng.choice((0.0, speeds[mover] / 3))
    across = _places(rng, [SIZES[size] for size in sizes])
    bodies = []
    for place, colour, shape, size, speed in zip(
        across, rng.sample(list(COLOURS), count), shapes, sizes, speeds, strict=True
    ):
        probe = Body(colour=colour, shape=shape, size=size)
        along = rng.uniform(-2.6, 2.6)
        x, y = (along, place) if layout == "lanes" else (place, along)
        yaw = rng.uniform(0.15, 0.6) * rng.choice((-1, 1)) if shape == "cube" else 0.0
        velocity = (speed, 0.0, 0.0) if layout == "lanes" else (0.0, speed, 0.0)
        position = (x, y, probe.half_height)
        bodies.append(replace(probe, event=_event(layout, speed), position=position, velocity=velocity, yaw=yaw))
    rng.shuffle(bodies)
    return bodies


def _event(layout: Layout, speed: float) -> str:
    if not speed:
        return "stays"
    if layout == "lanes":
        return "moves left" if speed < 0 else "moves right"
    return "moves closer" if speed < 0 else "moves away"


def _places(rng: random.Random, radii: Sequence[float]) -> list[float]:
    """Return the positions of the lanes, the nearest first: as far apart as the bodies need, from -1.9 m to about 1.9
    m.
    """
    gaps = [_ROOM * (a + b) for a, b in itertools.pairwise(radii)]
    spare = max(0.0, 3.8 - sum(gaps))
    cuts = sorted(rng.uniform(0, spare) for _ in radii)
    return [-1.9 + sum(gaps[:k]) + cuts[k] for k in range(len(radii))]


def _with_camera(bodies: Sequence[Body], camera: str, rng: random.Random, num_frames: int) -> Spec:
    spec = Spec(
        bodies=tuple(bodies),
        background=rng.choice(list(BACKGROUNDS)),
        light=(rng.uniform(-2.4, -0.7), rng.uniform(0.75, 1.2)),
        floor_phase=(rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi)),
        num_frames=num_frames,
    )
    if camera == "static":
        return spec
    turn = rng.randint(*_TURN)
    low, high, farthest = _RATE[camera.split()[0]]
    amount = min(farthest, turn * rng.uniform(low, high))
    # The camera does not start just before it turns: what the caption tells of the camera must hold for a while.
    start = rng.randint(0, turn - LEAST_ABSENCE)
    return replace(spec, camera=camera, camera_amount=amount, camera_turn=turn, camera_start=start)


def _course(body: Body, frame: int, fps: int) -> tuple[tuple[float, float, float], bool]:
    """Return the position of a body of a long scene at a frame, and whether it moves against its first direction."""
    (x, y, z), (vx, vy, _) = body.position, body.velocity
    steps, dt = frame * SUBSTEPS, 1 / (fps * SUBSTEPS)
    x, x_back = _between_walls(x, vx * dt, steps, WALL_X)
    y, y_back = _between_walls(y, vy * dt, steps, WALL_Y)
    return (x, y, z), x_back or y_back


def _between_walls(place: float, stride: float, steps: int, wall: float) -> tuple[float, bool]:
    """Return the position of a body after some steps, and whether the body moves against its first direction.

    The body turns around at the first step that ends beyond a wall, as in `physics`.
    """
    back = False
    while stride:
        until = math.floor((wall - math.copysign(place, place * stride)) / abs(stride)) + 1
        if until >= steps:
            break
        place, steps, stride, back = place + stride * until, steps - until, -stride, not back
    return place + stride * steps, back


@dataclass(slots=True)
class _Disc:
    """A body as a disc in the picture: centre, radius that encloses the body, radius that the body fills, depth."""

    u: float
    v: float
    outer: float
    inner: float
    depth: float

    @property
    def outside(self) -> bool:
        return max(abs(self.u), abs(self.v)) > 1.0 + self.outer

    @property
    def inside(self) -> bool:
        return max(abs(self.u), abs(self.v)) < 0.95 - 0.6 * self.outer

    def behind(self, others: Sequence[_Disc]) -> bool:
        """Return whether another disc leaves at most an eighth of this disc visible."""
        return any(o.depth < self.depth and self._off(o) < o.inner - 0.7 * self.outer for o in others)

    def clear(self, others: Sequence[_Disc]) -> bool:
        """Return whether no other disc hides any part of this disc."""
        return all(o.depth > self.depth or self._off(o) > o.outer + self.outer for o in others if o is not self)

    def _off(self, other: _Disc) -> float:
        return math.hypot(other.u - self.u, other.v - self.v)


def _row(spec: Spec, frame: int) -> list[_Disc]:
    pose, row = camera_pose(spec, frame), []
    for body in spec.bodies:
        u, v, depth = project_from(pose, _course(body, frame, spec.fps)[0])
        radius = FOCAL * body.radius / depth
        outer = radius if body.shape == "ball" else _ROOM * radius
        row.append(_Disc(u, v, outer, radius * HALF_WIDTH[body.shape], depth))
    return row


def _shows(spec: Spec, kind: str) -> bool:
    """Return whether a scene keeps the promises of `sample_long` within the first `HORIZON` frames.

    All bodies are visible at first, no body is too small or too close to the camera, and one is absent and comes back.
    """
    row = _row(spec, 0)
    if not all(disc.inside for disc in row) or not all(disc.clear(row) for disc in row):
        return False
    run, was_gone, came_back = [0] * len(row), [False] * len(row), False
    for frame in range(HORIZON):
        row = _row(spec, frame)
        for k, disc in enumerate(row):
            if not 0 < disc.outer < _LARGEST or (disc.inside and disc.outer < _SMALLEST):
                return False
            run[k] = run[k] + 1 if (disc.outside if kind == "leaves" else disc.behind(row)) else 0
            was_gone[k] = was_gone[k] or run[k] >= LEAST_ABSENCE
            came_back = came_back or (was_gone[k] and disc.inside and disc.clear(row))
    return came_back
