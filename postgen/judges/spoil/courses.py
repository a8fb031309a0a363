"""Bodies on impossible trajectories: kinds that are rendered, at each strength, from changed positions.

A `Way` maps the true positions (T,K,3) of the bodies of a scene in metres, the scene and a strength to new positions.
Its random numbers depend on the scene alone, so that the strengths of a scene differ in strength only. The positions
extend a little beyond the end of the clip (`course_frames`), for events that are moved to an earlier time.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.world.spec import HALF_WIDTH, PAIR_EVENTS, Body, Spec

_BEYOND = 8


@dataclass(frozen=True, slots=True)
class Way:
    """A kind: its four strengths, the function of the positions, and a test whether a scene can show the kind."""

    strengths: tuple[float, float, float, float]
    way: Callable[[Tensor, Spec, float], Tensor]
    shows: Callable[[Spec], bool]


def course_frames(frames: int) -> int:
    """Return the number of frames of true positions that a way needs for a clip of `frames` frames."""
    return frames + _BEYOND


def _chance(kind: str, spec: Spec) -> random.Random:
    return random.Random(f"{kind}-{spec.floor_phase}-{spec.bodies[0].position}")


def _leap(places: Tensor, spec: Spec, metres: float) -> Tensor:
    """Move the first body sideways, towards the middle, from a random frame on."""
    frames = len(places) - _BEYOND
    start = _chance("leap", spec).randint(frames // 4, 3 * frames // 4)
    result = places.clone()
    result[start:, 0, 0] += -metres if spec.bodies[0].position[0] > 0 else metres
    return result


def _tremble(places: Tensor, spec: Spec, metres: float) -> Tensor:
    """Shift the first body randomly in every frame (standard deviation in metres)."""
    rng = _chance("tremble", spec)
    result = places.clone()
    shift = [[rng.gauss(0, 1), rng.gauss(0, 1), 0.0] for _ in range(len(places))]
    result[:, 0] += metres * places.new_tensor(shift)
    return result


def _float(places: Tensor, spec: Spec, metres: float) -> Tensor:
    """Keep the first body at least `metres` above the floor: a fall ends in mid-air, other bodies hover."""
    result, first = places.clone(), spec.bodies[0]
    height = places[:, 0, 2]
    result[:, 0, 2] = height.clamp_min(first.half_height + metres) if first.event == "falls" else height + metres
    return result


def _slide(places: Tensor, spec: Spec, metres: float) -> Tensor:
    """Move a resting first body away without a cause, by `metres` until the end of the clip."""
    rng, frames = _chance("slide", spec), len(places) - _BEYOND
    start = rng.randint(frames // 3, frames // 2)
    time = torch.arange(len(places), dtype=places.dtype)
    part = ((time - start) / max(1, frames - 1 - start)).clamp_min(0)
    result = places.clone()
    if rng.random() < 0.7:
        result[:, 0, 0] += (-metres if spec.bodies[0].position[0] > 0 else metres) * part
    else:
        result[:, 0, 1] += (-metres if spec.bodies[0].position[1] > 0 else metres) * part
    return result


def _mistimed(places: Tensor, spec: Spec, frames: float) -> Tensor:
    """Start the motion of the body that is hit a number of frames too late or too early."""
    shift = int(frames) if _chance("mistimed", spec).random() < 0.5 else -int(frames)
    time = (torch.arange(len(places)) - shift).clamp(0, len(places) - 1)
    result = places.clone()
    result[:, 1] = places[time, 1]
    return result


def _gap(places: Tensor, spec: Spec, metres: float) -> Tensor:
    """Move the body that is hit farther away, so that it starts to move before it is touched."""
    result = places.clone()
    result[:, 1, 0] += metres if spec.bodies[0].velocity[0] > 0 else -metres
    return result


def _overlap(places: Tensor, spec: Spec, metres: float) -> Tensor:
    """Let two bodies that collide, or pass behind each other, overlap by `metres`."""
    first, second = spec.bodies[:2]
    deep = metres - _width(first) - _width(second)
    result = places.clone()
    if first.event == "collides":
        nearer = first.radius + second.radius + deep
        result[:, 1, 0] -= nearer if first.velocity[0] > 0 else -nearer
    else:
        result[:, 0, 1] -= places[0, 0, 1] - places[0, 1, 1] + deep
    return result


def _width(body: Body) -> float:
    return HALF_WIDTH[body.shape] * body.radius


def _is(*events: str) -> Callable[[Spec], bool]:
    return lambda spec: spec.bodies[0].event in events


COURSES = {
    "teleport": Way((0.5, 0.9, 1.4, 2.0), _leap, lambda spec: True),
    "tremble": Way((0.04, 0.08, 0.16, 0.35), _tremble, lambda spec: True),
    "floating": Way((0.3, 0.6, 1.0, 1.5), _float, lambda spec: spec.bodies[0].event not in PAIR_EVENTS),
    "slides off": Way((0.3, 0.6, 1.1, 1.7), _slide, _is("stays", "falls")),
    "mistimed hit": Way((2, 3, 5, 7), _mistimed, _is("collides")),
    "gap": Way((0.3, 0.6, 0.9, 1.3), _gap, _is("collides")),
    "overlap": Way((0.3, 0.6, 0.85, 1.1), _overlap, _is(*PAIR_EVENTS)),
}
"""Kind -> strengths in metres (`mistimed hit`: frames), function of the positions, and test of a scene."""
