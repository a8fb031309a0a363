"""Training data of `world_edges`: clips of the prisms of `edge_bodies`, and windows cut as the judge cuts them."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from postgen.judges.edge_bodies import Prism, corners, picture, plain
from postgen.world.check.edges import CELLS
from postgen.world.check.ground import balance
from postgen.world.check.segment import find_blobs, smooth
from postgen.world.check.shapes import views
from postgen.world.check.tracks import BODY_AREA
from postgen.world.spec import COLOURS, SIZES

FRAMES, BODIES = 5, 3
#: Clips per share; the number of a share is its random seed.
SHARE = 40
_SIZES = (64, 80, 96, 96, 96, 96, 128, 128, 160)
#: Strongest noise on the latents of a share. Shares below `_FIRST` were made with more noise, and are kept.
_NOISE, _NOISE_FIRST, _FIRST = 0.2, 0.3, 20


def course(rng: random.Random, place: int, rgb: tuple[float, float, float]) -> list[Prism]:
    """Return one body for each frame: it drifts, and in half of the clips its corners change."""
    half = 0.85 * rng.choice(list(SIZES.values())) * rng.uniform(0.95, 1.05)
    yaw = rng.uniform(0.15, 0.6) * rng.choice((-1, 1))
    first = corners(rng, 0 if yaw > 0 else 1)
    last = corners(rng, 0 if yaw > 0 else 1) if rng.random() < 0.5 else first
    tall = rng.uniform(0.7, 1.35) if max(*first, *last) > 0.5 else rng.uniform(0.95, 1.05)
    x, y = 1.5 * (place - 1) + rng.uniform(-0.5, 0.5), rng.uniform(-1.8, 2.4)
    z = rng.choice((0.0, 0.0, rng.uniform(0.0, 2.2)))
    dx, dy, dz = rng.uniform(-0.12, 0.12), rng.uniform(-0.1, 0.1), rng.uniform(-0.2, 0.2) if z else 0.0
    bodies = []
    for frame in range(FRAMES):
        part = frame / (FRAMES - 1)
        now = [(1 - part) * a + part * b for a, b in zip(first, last, strict=True)]
        foot = (x + frame * dx, y + frame * dy, max(0.0, z + frame * dz))
        bodies.append(Prism(foot, half, 2 * half * tall, yaw, rgb, (now[0], now[1], now[2], now[3])))
    return bodies


def clip(rng: random.Random, size: int) -> tuple[Tensor, list[list[Prism]], list[str]]:
    """Render a clip (F,3,H,W); return it with its bodies per frame and their colours."""
    names = rng.sample(list(COLOURS), BODIES)
    courses = [course(rng, k, COLOURS[name]) for k, name in enumerate(names)]
    spec, frames = plain(rng, FRAMES), list(zip(*courses, strict=True))
    shots = [picture(list(bodies), spec, f, size) for f, bodies in enumerate(frames)]
    return torch.stack(shots), [list(bodies) for bodies in frames], names


@torch.no_grad()
def redrawn(vae: Any, clip_F3HW: Tensor, rng: random.Random, most: float) -> Tensor:
    """Pass a clip through an autoencoder, usually with noise of up to `most` on its latents, fine or smoothed."""
    z = vae.encode((clip_F3HW[None] * 2 - 1).transpose(1, 2)).latent_dist.mode()
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    noise = torch.randn(z.shape, generator=generator)
    if rng.random() < 0.5:
        noise = 2 * functional.avg_pool3d(functional.pad(noise, (1, 1, 1, 1)), (1, 3, 3), 1)
    z = z + rng.choice((0.0, rng.uniform(0.0, most), rng.uniform(0.0, most))) * noise
    made: Tensor = vae.decode(z, return_dict=False)[0].transpose(1, 2)[0]
    return (made * 0.5 + 0.5).clamp(0, 1)


@torch.no_grad()
def cut(clip_F3HW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut windows (N,2,CELLS,CELLS) of the free-standing blobs of a clip; return frame, colour, area (N,) too."""
    pictures = smooth((clip_F3HW * 255).round() / 255)
    blobs = find_blobs(pictures, balance(pictures, len(pictures)))
    free = blobs.valid & ~blobs.touch & ~blobs.border & (blobs.area >= BODY_AREA * blobs.slot_MP.shape[1])
    frame, slot = free.nonzero(as_tuple=True)
    return views(blobs, frame, slot, CELLS)[0], frame, blobs.colour[frame, slot], blobs.area[frame, slot]


def as_bytes(window: Tensor) -> Tensor:
    """Convert windows to their stored form: int16, where 255 stands for 1."""
    return (window * 255).round().clamp(0, 400).short()


def make_share(share: int, vae: Any) -> dict[str, Tensor]:
    """Make the windows of one share of the clips, with the roundness of each body."""
    rng, windows, labels = random.Random(share), [], []
    most = _NOISE_FIRST if share < _FIRST else _NOISE
    for _ in range(SHARE):
        shot, frames, names = clip(rng, rng.choice(_SIZES))
        for one in (shot, redrawn(vae, shot, rng, most), redrawn(vae, shot, rng, most)):
            window, frame, colour, _ = cut(one)
            for k, (f, c) in enumerate(zip(frame.tolist(), colour.tolist(), strict=True)):
                if (name := list(COLOURS)[c]) in names:
                    windows.append(window[k])
                    labels.append(frames[f][names.index(name)].roundness)
    return {"window": as_bytes(torch.stack(windows)), "round": torch.tensor(labels)}
