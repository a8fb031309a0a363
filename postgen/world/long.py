"""Scenes of any length: bodies go to and fro while the camera does, hide behind each other, leave the view and return.

Nothing ends and nothing collides: every body has a lane (along x) or a column (along y) of its own between the walls,
so what a frame shows is a function of the first frames, however late it is.
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
"""Frames within which the first absence begins and ends."""
LEAST_ABSENCE = 8
"""Frames that it lasts at least."""

Absence = Literal["leaves", "hidden"]
Layout = Literal["lanes", "columns"]
_CAMERAS = tuple(name for name in CAMERAS if name != "dolly return")
_TURN = (24, 48)
#: Way of the camera in a frame, radians or factor of the distance, and the farthest that it goes.
_RATE = {"pan": (0.008, 0.014, 0.6), "orbit": (0.018, 0.030, 0.9), "dolly": (0.006, 0.009, 0.33)}
_SPEED = {"lanes": (0.6, 1.2), "columns": (0.5, 0.9)}
_OPPOSITE = {"moves left": "moves right", "moves closer": "moves away", "left": "right", "in": "out"}
_OPPOSITE |= {there: back for back, there in _OPPOSITE.items()}
_ROOM = 1.2
"""Distance of two lanes in contact radii: corners of cubes stand out of their contact circle."""
_LARGEST, _SMALLEST = 0.75, 0.1
"""Radii in half picture heights between which a body stays that is in the view: 5 px of 96 at least."""
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
    """Draw a scene that goes on for ever; the same arguments give the same scene everywhere, at every length.

    At least one body moves, all of them are seen in the first frame, and within the first 97 frames one that was seen
    is gone for 8 frames or more and comes back. The camera stands still or goes to and fro between two poses in whole
    frames; poses recur bit for bit.

    Args:
        seed: any integer.
        num_frames: what `render` takes by default and nothing else; a longer clip begins like a shorter one.
        num_bodies: 1 to 3; None draws 2 (60 %), 1 or 3 (20 % each).
        camera: name from `CAMERAS` without "dolly return" (every move returns here); None draws "static" in 20 %.
        absence: "leaves": a body leaves the view and returns, on its own way or by the camera's. "hidden": one passes
            behind another; needs two bodies. None draws "leaves" in 60 %, always with one body.
        split: as in `sample`; a body that turns counts with both of its ways.

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
    raise UserError(f"No long scene found for {num_bodies=}, {camera=}, {absence=}, {split=}.")


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
        raise UserError("absence='hidden' with num_bodies=1: there is nothing to hide behind, ask for 2 or 3.")
    if split not in ("train", "held_out", "all"):
        raise UserError(f"Unknown split {split!r}. Known: train, held_out, all.")


def caption_at(spec: Spec, frame: int, seed: int | None = None) -> str:
    """Say what a scene of `sample_long` does from a frame on: bodies and camera may have turned since the first one.

    Args:
        spec: the scene.
        frame: from 0 on.
        seed: of the wording, as in `caption`; None is that of `simple_caption`.

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
    # A camera that comes nearer would have a body of a column stand before its lens.
    if kind == "leaves" and not camera.startswith("dolly") and rng.random() < 0.3:
        layout = "columns"
    sizes = [rng.choice(list(SIZES)) for _ in range(count)]
    shapes = [rng.choice(SHAPES) for _ in range(count)]
    speeds = [rng.choice((-1.0, 1.0)) * rng.uniform(*_SPEED[layout]) if rng.random() < 0.7 else 0.0 for _ in sizes]
    mover = rng.randrange(count)
    if kind == "hidden":
        # A large body hides a small one for 8 frames where it stands, or goes the same way at a third of its speed.
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
    """Where lanes lie, the nearest first: as far apart as the bodies need, from -1.9 to 1.9 or a little more."""
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
    # Not just before it turns: what the caption says of the camera holds for a while.
    start = rng.randint(0, turn - LEAST_ABSENCE)
    return replace(spec, camera=camera, camera_amount=amount, camera_turn=turn, camera_start=start)


def _course(body: Body, frame: int, fps: int) -> tuple[tuple[float, float, float], bool]:
    """Where a body of a long scene is at a frame, and whether it goes against its first way."""
    (x, y, z), (vx, vy, _) = body.position, body.velocity
    steps, dt = frame * SUBSTEPS, 1 / (fps * SUBSTEPS)
    x, x_back = _between_walls(x, vx * dt, steps, WALL_X)
    y, y_back = _between_walls(y, vy * dt, steps, WALL_Y)
    return (x, y, z), x_back or y_back


def _between_walls(place: float, stride: float, steps: int, wall: float) -> tuple[float, bool]:
    """Where a body is after steps of which the first beyond a wall turns it, as in `physics`, and whether it is turned
    against its first way."""
    back = False
    while stride:
        until = math.floor((wall - math.copysign(place, place * stride)) / abs(stride)) + 1
        if until >= steps:
            break
        place, steps, stride, back = place + stride * until, steps - until, -stride, not back
    return place + stride * steps, back


@dataclass(slots=True)
class _Disc:
    """A body as a disc in the picture: centre, the radius that holds all of it and the one that it fills, depth."""

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
        """Whether another disc leaves an eighth of it at most."""
        return any(o.depth < self.depth and self._off(o) < o.inner - 0.7 * self.outer for o in others)

    def clear(self, others: Sequence[_Disc]) -> bool:
        """Whether no other disc hides any of it."""
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
    """Whether all bodies are seen at first, none is too small or before the lens, and one is gone and comes back."""
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
