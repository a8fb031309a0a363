"""Clips that are wrong on purpose, to calibrate `postgen.world.check`: corrupted clips of scenes, and fake clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from postgen import world
from postgen.world.camera import project_point
from postgen.world.check.segment import SHARE, colour_share
from postgen.world.physics import Simulation
from postgen.world.spec import COLOURS, HALF_HEIGHT, HALF_WIDTH, SHAPES, Body, Spec

#: Function that renders scenes: (specs, number of frames) -> clips (B,F,3,H,W).
Renderer = Callable[[Sequence[Spec], int], Tensor]
#: A position far beyond the fog, where a body is not visible.
_NOWHERE = (0.0, 900.0, 0.6)


def shuffled(clip: Tensor, seed: int) -> Tensor:
    """Return the frames in random order."""
    return clip[torch.randperm(len(clip), generator=torch.Generator().manual_seed(seed)).to(clip.device)]


def frozen(clip: Tensor) -> Tensor:
    """Return a clip that repeats the first frame."""
    return clip[:1].expand_as(clip)


def rounded(specs: Sequence[Spec], frames: int, make: Renderer, width: float = 0.8) -> Tensor:
    """Render the scenes with a squat cylinder in place of each cube, as high as the cube and `width` radii wide.

    True cylinders in the scenes become squat too.
    """
    cubes = [
        replace(s, bodies=tuple(replace(b, shape="cylinder" if b.shape == "cube" else b.shape) for b in s.bodies))
        for s in specs
    ]
    with patch.dict(HALF_HEIGHT, cylinder=HALF_HEIGHT["cube"]), patch.dict(HALF_WIDTH, cylinder=width):
        return make(cubes, frames)


def stained(clip: Tensor, own: str, other: str, part: float = 0.35, frames: slice = slice(None)) -> Tensor:
    """Paint the foot of the body with colour `own` half-way to the colour `other`.

    Args:
        clip: clip (F,3,H,W) in [0,1].
        own: colour of the body.
        other: second colour of the mixture.
        part: share of the body's height that is painted, from below.
        frames: frames to change.
    """
    share, _, bright = colour_share(clip)
    body = share > SHARE
    rows = torch.arange(clip.shape[-2], device=clip.device)[None, :, None]
    seen = body.any(-1, keepdim=True)
    low, high = torch.where(seen, rows, 10**6).amin(1, keepdim=True), torch.where(seen, rows, -1).amax(1, keepdim=True)
    foot = body & (rows > high - part * (high - low))
    colours = clip.new_tensor([COLOURS[own], COLOURS[other]])
    light = (bright * max(COLOURS[own]))[:, None].clamp(0, 1)
    paint = colours.mean(0)[:, None, None] / colours.mean(0).max() * light
    result = clip.clone()
    result[frames] = torch.where(foot[frames, None], paint[frames], clip[frames])
    return result


def blurred(clip: Tensor, sigma: float) -> Tensor:
    """Return the clip with every frame blurred by a Gaussian; `sigma` is in pixels."""
    reach = int(3 * sigma + 1)
    steps = torch.arange(-reach, reach + 1, device=clip.device).float()
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = kernel / kernel.sum()
    x = functional.pad(clip.reshape(-1, 1, *clip.shape[-2:]), (reach,) * 4, mode="replicate")
    x = functional.conv2d(functional.conv2d(x, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return x.reshape(clip.shape)


def softened(clip: Tensor, seed: int) -> Tensor:
    """Return the clip as a small autoencoder distorts it at worst: blur of 0.7 px and noise of 0.02."""
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed)).to(clip.device)
    return (blurred(clip, 0.7) + 0.02 * noise).clamp(0, 1)


def change_first(spec: Spec, **changes: object) -> Spec:
    """Return the scene with changed attributes of its first body."""
    return replace(spec, bodies=(replace(spec.bodies[0], **changes), *spec.bodies[1:]))


def other_colour(spec: Spec) -> Spec:
    """Return the scene with another colour of the first body.

    The colour is four places further in the table, or the next one after it that no body of the scene has.
    """
    names, taken = list(COLOURS), {b.colour for b in spec.bodies}
    start = names.index(spec.bodies[0].colour) + 4
    return change_first(spec, colour=next(n for k in range(8) if (n := names[(start + k) % 8]) not in taken))


def other_shape(spec: Spec) -> Spec:
    """Return the scene with the next shape for the first body, at the same height above the floor."""
    body = spec.bodies[0]
    shape = SHAPES[(SHAPES.index(body.shape) + 1) % len(SHAPES)]
    lift = body.position[2] - body.half_height
    height = replace(body, shape=shape).half_height + lift
    return change_first(spec, shape=shape, yaw=0.4 if shape == "cube" else 0.0, position=(*body.position[:2], height))


def without_first(spec: Spec) -> Spec:
    """Return the scene without its first body."""
    ghost = Body(colour=spec.bodies[0].colour, shape="ball", position=_NOWHERE)
    bodies = tuple(replace(b, event="stays", partner=None) for b in spec.bodies[1:])
    return replace(spec, bodies=(ghost, *bodies))


def moved_first(specs: Sequence[Spec], frames: int) -> list[Spec | None]:
    """Return each scene with its first body moved 1.7 m or more to the side.

    The moved body does not touch or hide another body in any frame. None stands for a scene without such a place.
    """
    tries = [[change_first(s, position=_aside(s.bodies[0], dx)) for dx in _ASIDE] for s in specs]
    return _first_clear(tries, [0] * len(specs), frames)


def doubled(specs: Sequence[Spec], frames: int) -> list[Spec | None]:
    """Return each scene with a copy of its first body that moves in the same way, 1.7 m or more to the side.

    The copy does not touch or hide another body in any frame. None stands for a scene without such a place.
    """
    tries = []
    for spec in specs:
        body = replace(spec.bodies[0], event="stays", partner=None)
        copies = [replace(body, position=_aside(body, dx)) for dx in _ASIDE]
        tries.append([replace(spec, bodies=(*spec.bodies, copy)) for copy in copies])
    return _first_clear(tries, [len(s.bodies) for s in specs], frames)


_ASIDE = (1.7, -1.7, 2.2, -2.2, 2.7, -2.7, 3.2, -3.2)


def _aside(body: Body, dx: float) -> tuple[float, float, float]:
    return body.position[0] + dx, body.position[1], body.position[2]


def _first_clear(tries: list[list[Spec]], index: list[int], frames: int) -> list[Spec | None]:
    """Return for each scene the first try in which its body `index` has room, or None. Simulate all in one batch."""
    flat = [spec for row in tries for spec in row]
    positions = iter(Simulation(flat).run(frames).positions_BFK3.tolist())
    result: list[Spec | None] = []
    for row, k in zip(tries, index, strict=True):
        good = [spec for spec in row if _clear(spec, k, next(positions))]
        result.append(good[0] if good else None)
    return result


def _clear(spec: Spec, index: int, positions: list[list[list[float]]]) -> bool:
    """Return whether a body is inside the picture and apart from every other body in all frames."""
    for places in positions:
        frame = places[: len(spec.bodies)]
        seen = [project_point(tuple(p)) for p in frame]
        reach = [2.77 * b.radius * 1.2 / s[2] for b, s in zip(spec.bodies, seen, strict=True)]
        u, v, _ = seen[index]
        if abs(u) + reach[index] > 1 or abs(v) + reach[index] > 1:
            return False
        for k, (s, t, _) in enumerate(seen):
            if k != index and math.hypot(u - s, v - t) < 1.1 * (reach[index] + reach[k]):
                return False
    return True


def spliced(first: Tensor, second: Tensor) -> Tensor:
    """Join the first half of one clip with the second half of the other."""
    half = len(first) // 2
    return torch.cat((first[:half], second[half:]))


def pretenders(frames: int, size: int, count: int) -> dict[str, Tensor]:
    """Return fake clips (count,F,3,H,W) by kind. They show no scene of the world."""
    rng = torch.Generator().manual_seed(7)
    shape = (count, frames, 3, size, size)
    noise = torch.rand(shape, generator=rng)
    tint = torch.tensor(list(COLOURS.values()))[torch.arange(count) % len(COLOURS)]
    solid = tint.reshape(count, 1, 3, 1, 1).expand(shape)
    return {
        "noise": noise,
        "high-contrast noise": (noise > 0.5).float(),
        "static high-contrast noise": (noise[:, :1] > 0.5).float().expand(shape),
        "solid colour": solid,
        "solid grey": torch.full(shape, 0.6),
        "photo": torch.stack([_photo(size, rng) for _ in range(count)])[:, None].expand(shape),
        "black text": _text(count, size, rng, torch.zeros(count, 3))[:, None].expand(shape),
        "coloured text": _text(count, size, rng, tint)[:, None].expand(shape),
        "empty floor": _floor(count, frames, size),
    }


def _photo(size: int, rng: torch.Generator) -> Tensor:
    """Return a picture with statistics of a photograph: coloured 1/f noise, some coloured areas with sharp edges."""
    picture = torch.zeros(3, size, size)
    for cells in (3, 6, 12, 24, 48):
        layer = torch.randn(1, 3, cells, cells, generator=rng)
        picture += functional.interpolate(layer, (size, size), mode="bicubic")[0] / cells**0.7
    picture = (0.5 + 0.35 * picture).clamp(0, 1)
    for _ in range(6):
        left, top, wide, high = (int(v) for v in torch.randint(4, size // 2, (4,), generator=rng))
        tone = torch.rand(3, 1, 1, generator=rng)
        area = picture[:, top : top + high, left : left + wide]
        area.copy_(0.6 * tone + 0.4 * area)
    return picture


def _text(count: int, size: int, rng: torch.Generator, ink: Tensor) -> Tensor:
    """Return pictures (count,3,H,W) with lines of random 5 x 7 glyphs, in colours `ink` (count,3) on light grey."""
    rows, columns = size // 9, size // 6
    glyphs = (torch.rand(count, rows, columns, 7, 5, generator=rng) > 0.5).float()
    page = functional.pad(glyphs, (0, 1, 0, 2)).permute(0, 1, 3, 2, 4).reshape(count, rows * 9, columns * 6)
    page = functional.pad(page, (0, size - columns * 6, 0, size - rows * 9))[:, None]
    return 0.8 * (1 - page) + ink[:, :, None, None] * page


def _floor(count: int, frames: int, size: int) -> Tensor:
    specs = [
        Spec(bodies=(Body(colour="red", shape="ball", position=_NOWHERE),), floor_phase=(float(k), 1.0))
        for k in range(count)
    ]
    return world.render(specs, num_frames=frames, size=size, supersample=1, geometry=False).rgb_BF3HW
