"""Bodies on ways that no body goes: kinds that are rendered, at each strength, from changed positions.

A way is a function of the true places (T,K,3) in metres of a scene's bodies, of the scene and of a strength. What is
random in it is drawn from the scene alone, so that the strengths of a scene differ in strength only. The places reach
a little beyond the clip (`course_frames`), for what comes early.
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
    """A kind: its four strengths, the way, and whether a scene can show it."""

    strengths: tuple[float, float, float, float]
    way: Callable[[Tensor, Spec, float], Tensor]
    shows: Callable[[Spec], bool]


def course_frames(frames: int) -> int:
    """Frames of the true places that a way is given for a clip of so many."""
    return frames + _BEYOND


def _chance(kind: str, spec: Spec) -> random.Random:
    return random.Random(f"{kind}-{spec.floor_phase}-{spec.bodies[0].position}")


def _leap(places: Tensor, spec: Spec, metres: float) -> Tensor:
    """From some frame on the first body is elsewhere: to the side, towards the middle."""
    frames = len(places) - _BEYOND
    start = _chance("leap", spec).randint(frames // 4, 3 * frames // 4)
    result = places.clone()
    result[start:, 0, 0] += -metres if spec.bodies[0].position[0] > 0 else metres
    return result


def _tremble(places: Tensor, spec: Spec, metres: float) -> Tensor:
    """The first body is a little beside its way in every frame (standard deviation in metres)."""
    rng = _chance("tremble", spec)
    result = places.clone()
    shift = [[rng.gauss(0, 1), rng.gauss(0, 1), 0.0] for _ in range(len(places))]
    result[:, 0] += metres * places.new_tensor(shift)
    return result


def _float(places: Tensor, spec: Spec, metres: float) -> Tensor:
    """The first body never comes nearer to the floor than so many metres: a fall ends in mid-air, the rest hovers."""
    result, first = places.clone(), spec.bodies[0]
    height = places[:, 0, 2]
    result[:, 0, 2] = height.clamp_min(first.half_height + metres) if first.event == "falls" else height + metres
    return result


def _slide(places: Tensor, spec: Spec, metres: float) -> Tensor:
    """The first body lies or stands, and goes away by itself, so many metres until the end."""
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
    """The body that is hit moves off so many frames late, or early."""
    shift = int(frames) if _chance("mistimed", spec).random() < 0.5 else -int(frames)
    time = (torch.arange(len(places)) - shift).clamp(0, len(places) - 1)
    result = places.clone()
    result[:, 1] = places[time, 1]
    return result


def _gap(places: Tensor, spec: Spec, metres: float) -> Tensor:
    """The body that is hit lies farther off: a gap is left between both when it moves off."""
    result = places.clone()
    result[:, 1, 0] += metres if spec.bodies[0].velocity[0] > 0 else -metres
    return result


def _overlap(places: Tensor, spec: Spec, metres: float) -> Tensor:
    """A collision, or a way behind another body, in which both run into each other by so many metres."""
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
"""Kind -> strengths, metres but for `mistimed hit`, whose are frames; the way; and what shows it."""
