"""A random search: random edits of true clips. Only a person's verdict says whether a result is right."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.world_kinds import paint
from benchmarks.world_kinds.stage import extra, shot, take
from benchmarks.world_kinds.table import Made, kind


def warp(clip: Tensor, turn: list[float], scale: list[float], dx: list[float], dy: list[float]) -> Tensor:
    """Rotate (radians), scale and shift (picture widths) each frame about its centre; repeat the border pixels."""
    rows = []
    for angle, factor, x, y in zip(turn, scale, dx, dy, strict=True):
        t, s = torch.tensor(angle), 1 / factor
        rows.append(torch.tensor([[s * t.cos(), -s * t.sin(), -2 * x], [s * t.sin(), s * t.cos(), -2 * y]]))
    grid = functional.affine_grid(torch.stack(rows), list(clip.shape), align_corners=False)
    return functional.grid_sample(clip, grid, padding_mode="border", align_corners=False)


def hue(clip: Tensor, angle: float) -> Tensor:
    """Rotate all colours about the grey axis by `angle` in radians."""
    t = torch.tensor(angle)
    axis = torch.full((3, 3), 1 / 3) * (1 - t.cos()) + torch.eye(3) * t.cos()
    part = t.sin() / 3**0.5 * torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return torch.einsum("ij,fjhw->fihw", axis + part, clip).clamp(0, 1)


def _edit(rng: random.Random, clip: Tensor, name: str) -> Tensor:
    n = len(clip)
    if name == "affine":
        one = [rng.uniform(-0.12, 0.12), rng.uniform(0.85, 1.2), rng.uniform(-0.06, 0.06), rng.uniform(-0.06, 0.06)]
        return warp(clip, *([v] * n for v in one))
    if name == "drifting affine":
        ends = [rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3), rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)]
        steps = [f / (n - 1) for f in range(n)]
        return warp(clip, *([b + e * t for t in steps] for b, e in zip((0.0, 1.0, 0.0, 0.0), ends, strict=True)))
    if name == "hue":
        return hue(clip, rng.choice((-1, 1)) * rng.uniform(0.1, 2.5))
    if name == "frames":
        order = list(range(n))
        for _ in range(rng.randrange(1, 5)):
            i, j = rng.randrange(n), rng.randrange(n)
            order = rng.choice((_exchanged, _held, _dropped))(order, min(i, j), max(i, j))
        return clip[order]
    cut = rng.randrange(3, n - 3)
    return torch.cat((clip[:cut], clip[cut:].flip(-1)))


def _exchanged(order: list[int], i: int, j: int) -> list[int]:
    order = list(order)
    order[i], order[j] = order[j], order[i]
    return order


def _held(order: list[int], i: int, j: int) -> list[int]:
    return [*order[:i], *[order[i]] * (j - i), *order[j:]]


def _dropped(order: list[int], i: int, j: int) -> list[int]:
    rest = [*order[:i], *order[j:]]
    return [rest[k * (len(rest) - 1) // (len(order) - 1)] for k in range(len(order))] if len(rest) > 1 else order


@kind("search", right=False, count=24)
def random_edit(rng: random.Random) -> Made:
    """One or two random edits of the pictures or of the order of the frames."""
    clip = shot(rng, None, rng.choice((1, 1, 2)))
    pictures = clip.shoot()
    for name in rng.sample(("affine", "drifting affine", "hue", "frames", "mirrored half"), rng.choice((1, 1, 2))):
        pictures = _edit(rng, pictures, name)
    return clip.prompt, pictures


@kind("search", right=False, count=12)
def random_patch(rng: random.Random) -> Made:
    """A painted patch at a random place, with random size, motion, colour, opacity and frames."""
    clip = shot(rng, None, rng.choice((1, 1, 2)))
    pictures = clip.shoot().clone()
    start, stop = sorted(rng.sample(range(18), 2))
    x, y, r, alpha = rng.uniform(0.1, 0.9), rng.uniform(0.2, 0.9), rng.uniform(0.02, 0.12), rng.uniform(0.15, 1.0)
    rgb = (rng.random(), rng.random(), rng.random())
    outline = rng.choice((paint.circle, paint.polygon(4), paint.ellipse(1.4, 0.7), paint.star(5, 0.5)))
    vx, vy = rng.uniform(-0.02, 0.02), rng.uniform(-0.02, 0.02)
    for f in range(start, stop):
        spot = paint.paint(pictures[f], outline, x + vx * f, y + vy * f, r, rgb, rng.random() < 0.5)
        pictures[f] = (1 - alpha) * pictures[f] + alpha * spot
    return clip.prompt, pictures


@kind("search", right=False, count=6)
def random_splice(rng: random.Random) -> Made:
    """The beginning of one clip and the end of another clip with the same prompt."""
    one = shot(rng, None, 1)
    two = take(one.spec)
    body = extra(rng, two, colour=one.frames[0][0].colour, shape=one.frames[0][0].shape, size=one.frames[0][0].size)
    two.edit(0, lambda _, b: body)
    cut = rng.randrange(5, 13)
    return one.prompt, torch.cat((one.shoot()[:cut], two.shoot()[cut:]))
