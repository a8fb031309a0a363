"""Whether the camera moves as requested: the flow of the ground against the exact flow of the requested path.

If the camera follows the requested path by `a` times the usual distance, the brightness of the ground changes from one
frame to the next by -a (gradient . flow); `a` is the least-squares solution over the whole clip. Bodies and their
surroundings are excluded, so a body that moves by does not count as a camera pan.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from postgen.world.camera import FOCAL, camera_path
from postgen.world.spec import Body, Spec

_GRID = 48
#: Usual amount of the camera motion within a clip: the middle of the world's range.
_AMOUNT = {"pan": 0.16, "orbit": 0.475, "dolly": 0.25}
_KINDS = ("pan left", "orbit left", "dolly in", "dolly return")
#: Number of rows at the top that are skipped, as they show no ground.
_TOP = 8
#: Largest length of a clip whose flow is cached for the next clip.
_KEPT = 512


def flow(camera: str, frames: int, low: int = 0, high: int | None = None) -> Tensor:
    """Return the flow of the ground (F-1,2,GRID,GRID) in cells per frame, for a camera that moves the usual distance.

    Args:
        camera: as in a `Spec`.
        frames: length of the whole clip.
        low, high: range of the frame pairs to return; None for `high` means the last one.
    """
    if frames <= _KEPT:
        return _flow(camera, frames, 0, frames - 1)[low:high]
    return _flow.__wrapped__(camera, frames, low, frames - 1 if high is None else high)


@functools.lru_cache(maxsize=32)
def _flow(camera: str, frames: int, low: int, high: int) -> Tensor:
    spec = Spec(
        bodies=(Body(colour="red", shape="ball"),),
        camera=camera,
        camera_amount=_AMOUNT[camera.split()[0]],
        num_frames=frames,
    )
    position, rotation = camera_path(spec, low, high + 1)
    steps = (torch.arange(_GRID) + 0.5) / _GRID * 2 - 1
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    ray = torch.stack((u / FOCAL, v / FOCAL, torch.ones_like(u)), -1).reshape(-1, 3)
    ray = torch.einsum("fji,pj->fpi", rotation[:-1], ray)
    down = ray[..., 2:] < -0.02
    far = torch.where(down, -position[:-1, None, 2:] / ray[..., 2:].clamp_max(-0.02), 1e4)
    seen = torch.einsum("fij,fpj->fpi", rotation[1:], position[:-1, None] + far * ray - position[1:, None])
    moved = (seen[..., :2] / seen[..., 2:].clamp_min(1e-6) * FOCAL + 1) * (_GRID / 2)
    start = torch.stack((u, v), -1).reshape(-1, 2) * (_GRID / 2) + _GRID / 2
    field: Tensor = (moved - start).movedim(-1, 1).unflatten(-1, (_GRID, _GRID))
    return field


def filmed(pictures_M3HW: Tensor, body_MHW: Tensor, cameras: Sequence[str]) -> list[float | None]:
    """Return the camera's distance along the requested path for each clip, relative to the usual distance.

    The value is lower if another path explains the flow better. It is None for a static camera.
    """
    frames = len(pictures_M3HW) // len(cameras)
    result: list[float | None] = [None] * len(cameras)
    for row, camera in enumerate(cameras):
        if camera != "static":
            part = slice(row * frames, (row + 1) * frames)
            film = Film(camera, frames)
            film.add(pictures_M3HW[part], body_MHW[part])
            result[row] = film.way()
    return result


class Film:
    """Estimate of the camera motion of one clip, from consecutive windows of its pictures.

    Args:
        camera: the requested path.
        frames: length of the whole clip.
    """

    def __init__(self, camera: str, frames: int) -> None:
        self.camera, self.frames = camera, frames
        self._last: tuple[Tensor, Tensor] | None = None
        self._pairs = 0
        self._total = 0.0
        #: Sum of squares of the predicted change along each path, and sum of its products with the observed change.
        self._power, self._product = (dict.fromkeys(_KINDS, 0.0) for _ in range(2))

    def add(self, pictures_F3HW: Tensor, body_FHW: Tensor) -> None:
        """Add the next frames, and the mask of their body pixels."""
        small = _soft(functional.adaptive_avg_pool2d(pictures_F3HW, _GRID))
        body = functional.adaptive_max_pool2d(body_FHW.float()[:, None], _GRID)
        free = 1 - functional.max_pool2d(body, 9, 1, 4)
        if self._last is not None:
            small, free = (torch.cat(pair) for pair in zip(self._last, (small, free), strict=True))
        self._last = small[-1:], free[-1:]
        if len(small) > 1:
            self._add(small, free)

    def _add(self, small: Tensor, free: Tensor) -> None:
        weight = (free[1:] * free[:-1])[:, 0]
        weight[:, :_TOP] = 0
        weight[..., :2] = weight[..., -2:] = weight[:, -2:] = 0
        change = small[1:] - small[:-1]
        middle = (small[1:] + small[:-1]) / 2
        dx = torch.zeros_like(middle)
        dy = torch.zeros_like(middle)
        dx[..., 1:-1] = (middle[..., 2:] - middle[..., :-2]) / 2
        dy[..., 1:-1, :] = (middle[..., 2:, :] - middle[..., :-2, :]) / 2
        self._total += float((weight[:, None] * change * change).sum())
        low, self._pairs = self._pairs, self._pairs + len(change)
        for kind in _KINDS:
            field = flow(kind, self.frames, low, self._pairs).to(small.device)
            along = field[:, None, 0] * dx + field[:, None, 1] * dy
            self._power[kind] += float((weight[:, None] * along * along).sum())
            self._product[kind] += float((weight[:, None] * along * change).sum())

    def way(self) -> float:
        """Return the camera's distance along the requested path, as in `filmed`."""
        camera = self.camera
        best, own, way = 0.0, 0.0, 0.0
        for kind in _KINDS:
            power = self._power[kind]
            amount = -self._product[kind] / max(power, 1e-9)
            held = amount * amount * power / max(self._total, 1e-9)
            if kind.split()[0] == camera.split()[0] and (camera == "dolly return") == (kind == "dolly return"):
                own, way = held, amount if camera == kind else -amount
            else:
                best = max(best, held)
        # If another path explains the flow better, the camera does not follow the requested path.
        return way * min(1.0, own / max(best, 1e-9))


def _soft(maps_F3GG: Tensor) -> Tensor:
    x = functional.pad(maps_F3GG, (2, 2, 2, 2), mode="replicate")
    return functional.avg_pool2d(functional.avg_pool2d(x, 3, 1), 3, 1)
