"""The camera: a pinhole 7.5 m in front of the arena and 3 m above the floor, and the paths that it can follow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .spec import Spec

POSITION = (0.0, -7.5, 3.0)
TARGET = (0.0, 0.3, 0.75)
#: Focal length in half picture heights; half the field of view is 19.9 degrees.
FOCAL = 2.77


def project_point(point: tuple[float, float, float]) -> tuple[float, float, float]:
    """Project a world point with the camera at frame 0.

    Args:
        point: (x, y, z) in metres.

    Returns:
        (u, v, depth): u to the right and v down in half picture heights, depth in metres.
    """
    forward, right, up = _FIRST_AXES
    x, y, z = point[0] - POSITION[0], point[1] - POSITION[1], point[2] - POSITION[2]
    depth = forward[0] * x + forward[1] * y + forward[2] * z
    u = right[0] * x + right[1] * y
    v = -(up[0] * x + up[1] * y + up[2] * z)
    return FOCAL * u / depth, FOCAL * v / depth, depth


def _axes(position: tuple[float, ...], target: tuple[float, ...]) -> tuple[list[float], list[float], list[float]]:
    forward = [t - p for t, p in zip(target, position, strict=True)]
    norm = math.sqrt(sum(f * f for f in forward))
    forward = [f / norm for f in forward]
    flat = math.hypot(forward[0], forward[1])
    right = [forward[1] / flat, -forward[0] / flat, 0.0]
    up = [
        right[1] * forward[2] - right[2] * forward[1],
        right[2] * forward[0] - right[0] * forward[2],
        right[0] * forward[1] - right[1] * forward[0],
    ]
    return forward, right, up


_FIRST_AXES = _axes(POSITION, TARGET)


def camera_pose(spec: Spec, frame: int) -> tuple[list[float], list[list[float]]]:
    """Return the camera pose at a frame: the position, and the rows right, down, forward of the world-to-camera
    rotation.

    After `spec.num_frames` frames the camera follows its path backwards, then forwards again, so it returns to its
    first pose. With `spec.camera_turn` it turns at whole frames, and a pose that recurs has the same bits.
    """
    if spec.camera_turn is not None:
        there_and_back = _folded(spec.camera_start + frame, spec.camera_turn) / spec.camera_turn
    else:
        phase = frame / max(1, spec.num_frames - 1)
        there_and_back = 1.0 - abs(1.0 - phase % 2.0)
        if spec.camera == "dolly return":
            there_and_back = 1.0 - abs(1.0 - (2.0 * phase) % 2.0)
    kind, _, way = spec.camera.partition(" ")
    sign = -1.0 if way in ("left", "in", "return") else 1.0
    shift = sign * spec.camera_amount * there_and_back
    position, target = list(POSITION), list(TARGET)
    if kind == "pan":
        target = _turn(target, position, -shift)
    elif kind == "orbit":
        position = _turn(position, target, shift)
    elif kind == "dolly":
        position = [t + (p - t) * (1.0 + shift) for p, t in zip(position, target, strict=True)]
    forward, right, up = _axes(tuple(position), tuple(target))
    return position, [right, [-u for u in up], forward]


def _folded(step: int, turn: int) -> int:
    """Return the position after `step` steps of a walk that goes from 0 to `turn` and back, repeatedly."""
    return turn - abs(turn - step % (2 * turn))


def goes_back(spec: Spec, frame: int) -> bool:
    """Return whether a camera with `spec.camera_turn` moves back towards its first pose after a frame."""
    return spec.camera_turn is not None and (spec.camera_start + frame) // spec.camera_turn % 2 == 1


def project_from(
    pose: tuple[Sequence[float], Sequence[Sequence[float]]], point: Sequence[float]
) -> tuple[float, float, float]:
    """Project a world point with a pose of `camera_pose`; the result (u, v, depth) is as in `project_point`."""
    position, rotation = pose
    offset = [a - b for a, b in zip(point, position, strict=True)]
    u, v, depth = (sum(r * o for r, o in zip(row, offset, strict=True)) for row in rotation)
    return FOCAL * u / depth, FOCAL * v / depth, depth


def intrinsics(size: int) -> Tensor:
    """Return the intrinsic matrix K (3,3), float32, of square pictures; pixel centres lie at half-integer coordinates.

    Args:
        size: height and width in pixels.

    >>> intrinsics(200)[0].tolist()
    [277.0, 0.0, 100.0]
    """
    half = size / 2
    return torch.tensor([[FOCAL * half, 0.0, half], [0.0, FOCAL * half, half], [0.0, 0.0, 1.0]])


def _turn(point: list[float], centre: list[float], angle: float) -> list[float]:
    x, y = point[0] - centre[0], point[1] - centre[1]
    cos, sin = math.cos(angle), math.sin(angle)
    return [centre[0] + cos * x - sin * y, centre[1] + sin * x + cos * y, point[2]]


def camera_path(spec: Spec, start: int, stop: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return the poses of frames start to stop - 1: positions (F,3) and world-to-camera rotations (F,3,3), float32."""
    if spec.camera == "static":
        poses = [camera_pose(spec, 0)] * (stop - start)
    else:
        poses = [camera_pose(spec, frame) for frame in range(start, stop)]
    positions = torch.tensor([p for p, _ in poses], device=device)
    return positions, torch.tensor([r for _, r in poses], device=device)
