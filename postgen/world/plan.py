"""From words to a scene: start positions and speeds of the bodies, such that every event happens within the clip."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from postgen.errors import UserError

from .camera import FOCAL, project_point
from .spec import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    EVENTS,
    FPS,
    PAIR_EVENTS,
    SHAPES,
    SIZES,
    Body,
    Spec,
    Split,
    is_held_out,
)

GRAVITY = 2.5
"""Gravity in m/s^2; weaker than on earth, so that a fall at 8 fps moves a few pixels per frame at 96 px."""

_MAX_SPEED = 1.5
_ROLL_X = (1.6, 2.9)
_ROLL_Y = (2.4, 3.4)
_VISIBLE_X = 0.86
_TRIES = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What is requested of one body. None leaves size, place and heading to chance; `partner` None: no partner."""

    colour: str
    shape: str
    event: str
    size: str | None = None
    partner: int | None = None
    place: str | None = None
    heading: str | None = None


def eligible_events(num_frames: int, num_bodies: int) -> tuple[str, ...]:
    """Return the events that fit into `num_frames` frames at 8 fps.

    Events of two bodies and "bounces" need 17 frames.
    """
    long_enough = num_frames >= 17
    names = [e for e in EVENTS if e not in PAIR_EVENTS and (long_enough or e != "bounces")]
    if num_bodies >= 2 and long_enough:
        names += PAIR_EVENTS
    return tuple(names)


def sample(
    seed: int,
    *,
    num_frames: int = 17,
    num_bodies: int | None = None,
    event: str | None = None,
    camera: str | None = None,
    split: Split = "train",
) -> Spec:
    """Draw a scene. The same arguments give the same scene on every machine.

    Args:
        seed: any integer.
        num_frames: length of the clip within which the events happen, at 8 fps; at least 5.
        num_bodies: 1 to 3; None draws 1 (50 %), 2 (40 %) or 3 (10 %).
        event: event of the first body; None draws one.
        camera: name from `CAMERAS`; None draws "static" in 80 %. With a camera that moves, all bodies stay.
        split: "train" never contains a held-out (colour, shape, event), "held_out" always contains one, "all" may
            contain one.

    Raises:
        UserError: an argument outside these ranges.
    """
    if num_frames < 5:
        raise UserError(f"num_frames is {num_frames}: a scene needs at least 5 frames to show an event.")
    if split not in ("train", "held_out", "all"):
        raise UserError(f"Unknown split {split!r}. Known: train, held_out, all.")
    if event not in (None, "stays") and camera not in (None, "static"):
        raise UserError(f"Event {event!r} with camera {camera!r}: a camera that moves needs event 'stays' or None.")
    if num_bodies is not None and not 1 <= num_bodies <= 3:
        raise UserError(f"num_bodies must be 1, 2 or 3, not {num_bodies}.")
    rng = random.Random(f"postgen-world-{seed}-{num_frames}-{num_bodies}-{event}-{camera}-{split}")
    # Draw until the split and the layout fit.
    for _ in range(1000):
        wishes, chosen = _draw(rng, num_frames, num_bodies, event, camera)
        held = any(is_held_out(w.colour, w.shape, w.event) for w in wishes)
        if split != "all" and held != (split == "held_out"):
            continue
        spec = arrange(wishes, rng, num_frames=num_frames, camera=chosen)
        if spec is not None:
            return spec
    raise UserError(
        f"No scene found for num_frames={num_frames}, event={event!r}, camera={camera!r}, split={split!r}: try another"
        " seed."
    )


def _draw(
    rng: random.Random, num_frames: int, num_bodies: int | None, event: str | None, camera: str | None
) -> tuple[list[Wish], str]:
    least = 2 if event in PAIR_EVENTS else 1
    count = num_bodies or max(least, rng.choices((1, 2, 3), (0.5, 0.4, 0.1))[0])
    chosen = camera or (rng.choice(CAMERAS[1:]) if event in (None, "stays") and rng.random() < 0.2 else "static")
    known = eligible_events(num_frames, count)
    if event is not None and event not in known:
        raise UserError(
            f"Event {event!r} with {count} bodies in {num_frames} frames: possible events are {', '.join(known)}."
        )
    colours = rng.sample(list(COLOURS), count)
    wishes = []
    for index, colour in enumerate(colours):
        name = event if index == 0 and event else rng.choice(known)
        if chosen != "static":
            name = "stays"
        elif index and name in PAIR_EVENTS:
            name = rng.choice(eligible_events(num_frames, 1))
        wishes.append(Wish(colour=colour, shape=rng.choice(SHAPES), event=name, size=rng.choice(list(SIZES))))
    if wishes[0].event in PAIR_EVENTS:
        wishes[0] = replace(wishes[0], partner=1)
        size = wishes[0].size if wishes[0].event == "collides" else "large"
        wishes[1] = replace(wishes[1], event="stays", size=size)
    return wishes, chosen


def arrange(wishes: Sequence[Wish], rng: random.Random, *, num_frames: int, camera: str = "static") -> Spec | None:
    """Find positions and speeds of the bodies for the wishes; return None when no layout fits.

    Every body stays in the picture and is at least 13 px wide at 96 px. No other body hides most of it, unless its
    event requires that.
    """
    duration = (num_frames - 1) / FPS
    for _ in range(_TRIES):
        bodies = _bodies(wishes, rng, duration)
        if bodies is not None and _fits(bodies, duration):
            return _with_surroundings(bodies, rng, num_frames, camera)
    return None


def _with_surroundings(bodies: Sequence[Body], rng: random.Random, num_frames: int, camera: str) -> Spec:
    amount = {"pan": rng.uniform(0.12, 0.2), "orbi": rng.uniform(0.35, 0.6), "doll": rng.uniform(0.2, 0.3)}
    return Spec(
        bodies=tuple(bodies),
        camera=camera,
        camera_amount=amount.get(camera.split()[0][:4], 0.0),
        background=rng.choice(list(BACKGROUNDS)),
        light=(rng.uniform(-2.4, -0.7), rng.uniform(0.75, 1.2)),
        floor_phase=(rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi)),
        num_frames=num_frames,
    )


def _bodies(wishes: Sequence[Wish], rng: random.Random, duration: float) -> list[Body] | None:
    bodies: list[Body | None] = [None] * len(wishes)
    for index, wish in enumerate(wishes):
        if wish.partner is not None:
            first, second = _pair(wish, wishes[wish.partner], rng, duration)
            bodies[index], bodies[wish.partner] = first, second
    for index, wish in enumerate(wishes):
        if bodies[index] is None:
            bodies[index] = _single(wish, rng, duration)
    return [b for b in bodies if b is not None]


def _body(wish: Wish, rng: random.Random, size: str, x: float, y: float, **motion: Any) -> Body:
    probe = Body(colour=wish.colour, shape=wish.shape, size=size)
    lift = float(motion.pop("lift", 0.0))
    yaw = rng.uniform(0.15, 0.6) * rng.choice((-1, 1)) if wish.shape == "cube" else 0.0
    return replace(
        probe, event=wish.event, partner=wish.partner, position=(x, y, probe.half_height + lift), yaw=yaw, **motion
    )


def _single(wish: Wish, rng: random.Random, duration: float) -> Body:
    size = wish.size or rng.choice(list(SIZES))
    y = rng.uniform(-1.5, 1.6)
    if wish.event in ("moves left", "moves right"):
        sign = -1.0 if wish.event == "moves left" else 1.0
        path = min(rng.uniform(*_ROLL_X), _MAX_SPEED * duration)
        x = -sign * rng.uniform(path - 2.3, 2.3)
        return _body(wish, rng, size, x, y, velocity=(sign * path / duration, 0.0, 0.0))
    if wish.event in ("moves closer", "moves away"):
        sign = -1.0 if wish.event == "moves closer" else 1.0
        path = min(rng.uniform(*_ROLL_Y), 1.25 * _MAX_SPEED * duration)
        y = rng.uniform(path - 1.7, 2.0) if sign < 0 else rng.uniform(-1.7, 2.0 - path)
        return _body(wish, rng, size, rng.uniform(-1.3, 1.3), y, velocity=(0.0, sign * path / duration, 0.0))
    x = _place_x(wish.place, rng)
    if wish.event == "falls":
        lift = min(rng.uniform(1.0, 1.7), 0.5 * GRAVITY * (0.8 * duration) ** 2)
        return _body(wish, rng, size, x, y, lift=lift)
    if wish.event == "bounces":
        lift = min(rng.uniform(1.1, 1.7), 0.5 * GRAVITY * (0.5 * duration) ** 2)
        return _body(wish, rng, size, x, y, lift=lift, restitution=0.9)
    return _body(wish, rng, size, x, y)


def _place_x(place: str | None, rng: random.Random) -> float:
    ranges = {"left": (-1.8, -1.0), "middle": (-0.5, 0.5), "right": (1.0, 1.8)}
    low, high = ranges.get(place or "", (-1.8, 1.8))
    return rng.uniform(low, high)


def _pair(wish: Wish, other: Wish, rng: random.Random, duration: float) -> tuple[Body, Body]:
    sign = {"left": -1.0, "right": 1.0}.get(wish.heading or "", rng.choice((-1.0, 1.0)))
    if wish.event == "collides":
        size = wish.size or rng.choice(list(SIZES))
        partner_size = other.size or size
        contact = SIZES[size] + SIZES[partner_size]
        path = min(rng.uniform(1.0, 1.5), 0.45 * _MAX_SPEED * duration)
        x = rng.uniform(-0.4, 0.4)
        y = rng.uniform(-1.2, 1.2)
        hit = _body(other, rng, partner_size, x, y)
        speed = sign * path / (0.42 * duration)
        return _body(wish, rng, size, x - sign * (contact + path), y, velocity=(speed, 0.0, 0.0)), hit
    size = "medium" if (wish.size or rng.choice(("small", "medium"))) != "small" else "small"
    x = rng.uniform(-0.25, 0.25)
    front = _body(other, rng, "large", x, rng.uniform(-0.6, -0.4))
    path = min(rng.uniform(3.2, 3.8), 1.3 * _MAX_SPEED * duration)
    y = front.position[1] + SIZES["large"] + SIZES[size] + rng.uniform(0.1, 0.3)
    start = x * 1.15 - sign * path / 2
    return _body(wish, rng, size, start, y, velocity=(sign * path / duration, 0.0, 0.0)), front


def _path(body: Body, seconds: float) -> tuple[float, float, float]:
    """Return the position of a body after some seconds, if it meets no other body and no wall."""
    x, y, z = (p + v * seconds for p, v in zip(body.position, body.velocity, strict=True))
    if body.event in ("falls", "bounces"):
        z = body.half_height + _drop(z - body.half_height, body.restitution, seconds)
    return x, y, z


def _drop(lift: float, restitution: float, seconds: float) -> float:
    """Return the height in metres above the floor of a body that was released at `lift` metres.

    At each landing the body keeps the share `restitution` of its speed.
    """
    fall = math.sqrt(2 * lift / GRAVITY)
    if seconds < fall:
        return lift - 0.5 * GRAVITY * seconds**2
    if restitution <= 0.5:
        return 0.0
    seconds, speed = seconds - fall, restitution * GRAVITY * fall
    while speed > 0.05 and seconds > 2 * speed / GRAVITY:
        seconds -= 2 * speed / GRAVITY
        speed *= restitution
    return max(0.0, (speed - 0.5 * GRAVITY * seconds) * seconds)


def _fits(bodies: Sequence[Body], duration: float) -> bool:
    tracks = []
    for body in bodies:
        track = []
        for step in (0, 12, *range(1, 12)):
            x, y, z = _path(body, duration * step / 12)
            u, v, depth = project_point((x, y, z))
            radius = FOCAL * body.radius / depth
            wide = abs(u) + radius * 0.9
            tall = abs(v) + radius * max(0.9, body.half_height / body.radius) * 0.9
            stops_early = body.event == "collides" and step > 5
            if not stops_early and (max(wide, tall) > _VISIBLE_X + 0.12 or 2 * radius * 48 < 13):
                return False
            track.append((u, v, radius))
        tracks.append(track)
    for i, first in enumerate(tracks):
        for j in range(i):
            if bodies[i].partner == j or bodies[j].partner == i:
                continue
            hit = any(b.event == "collides" for b in bodies)
            for (u, v, r), (s, t, q) in zip(first, tracks[j], strict=True):
                if math.hypot(u - s, v - t) < (1.15 if hit else 0.85) * (r + q):
                    return False
            if _touch(bodies[i], bodies[j], duration):
                return False
    return True


def _touch(first: Body, second: Body, duration: float) -> bool:
    for step in range(9):
        a, b = _path(first, duration * step / 8), _path(second, duration * step / 8)
        if math.dist(a[:2], b[:2]) < 1.1 * (first.radius + second.radius):
            return True
    return False
