"""Textures from patterns and photos in one lookup table, with mipmaps so that distant surfaces do not flicker."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from postgen.errors import UserError
from postgen.video import PICTURES, read_picture

_SIZE, _LEVELS = 128, 6
_PATTERNS = ("noise", "stripes", "checks", "spots")


class Textures:
    """Square textures (N,3,128,128) in [0,1]. A texture is 2 units long, and repeats mirrored beyond its edges.

    The table holds each texture at six resolutions, each half as fine as the one before (mipmaps).
    """

    def __init__(self, pictures_N3HW: Tensor) -> None:
        levels = [pictures_N3HW]
        for k in range(1, _LEVELS):
            small = functional.avg_pool2d(pictures_N3HW, 2**k)
            levels.append(functional.interpolate(small, (_SIZE, _SIZE), mode="bilinear"))
        self.table = torch.stack(levels, 1).movedim(2, 0).flatten(1).contiguous()

    def __len__(self) -> int:
        return self.table.shape[1] // (_LEVELS * _SIZE * _SIZE)

    def to(self, device: torch.device | str) -> Textures:
        """Move the table to a device, and return this object."""
        self.table = self.table.to(device)
        return self

    def look_up(self, number: Tensor, u: Tensor, v: Tensor, covered: Tensor) -> Tensor:
        """Return colours (3, ...) of textures `number` at coordinates (u, v), for pixels that cover this length."""
        level = (covered * (_SIZE / 2)).clamp(1, 2 ** (_LEVELS - 1)).log2().round().long()
        column, row = _mirrored(u), _mirrored(v)
        index = ((number * _LEVELS + level) * _SIZE + row) * _SIZE + column
        return self.table[:, index]


def _mirrored(length: Tensor) -> Tensor:
    place = (length.clamp(-1e4, 1e4) * 0.5) % 2
    return ((1 - (place - 1).abs()) * _SIZE).long().clamp(0, _SIZE - 1)


def make_textures(count: int, photos: str | Path | None, generator: torch.Generator) -> Textures:
    """Draw `count` patterns. If a folder of photos is given, also cut `count` squares from its pictures.

    Raises:
        UserError: the folder has no pictures.
    """
    made = torch.stack([_pattern(_PATTERNS[k % len(_PATTERNS)], generator) for k in range(count)])
    if photos is None:
        return Textures(made)
    files = sorted(path for path in Path(photos).iterdir() if path.suffix.lower() in PICTURES)
    if not files:
        raise UserError(
            f"{photos} has no pictures ({', '.join(PICTURES)}): give another folder for photos, or omit photos"
        )
    # np.array copies: the array of a PIL picture is read-only, and torch warns about read-only arrays.
    pictures = [torch.from_numpy(np.array(read_picture(path))).movedim(-1, 0).float() / 255 for path in files]
    cuts = [_cut(pictures[k % len(pictures)], generator) for k in range(count)]
    return Textures(torch.cat((made, torch.stack(cuts))))


def _cut(picture_3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Cut a random square of at least a third of the shorter side, and resize it to the size of the table."""
    height, width = picture_3HW.shape[1:]
    part, down, right = torch.rand(3, generator=generator).tolist()
    side = max(8, int(min(height, width) * (1 / 3 + 2 / 3 * part)))
    top, left = int(down * (height - side)), int(right * (width - side))
    square = picture_3HW[None, :, top : top + side, left : left + side]
    return functional.interpolate(square, (_SIZE, _SIZE), mode="bilinear", antialias=True)[0].clamp(0, 1)


def _pattern(kind: str, generator: torch.Generator) -> Tensor:
    """Draw a pattern of two colours, (3,128,128)."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    steps = torch.arange(_SIZE) / _SIZE
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    angle, count = math.pi * float(uniform(1)), 2 + 14 * float(uniform(1)) ** 2
    across, along = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if kind == "noise":
        share = torch.zeros(_SIZE, _SIZE)
        power = 0.4 + 0.6 * float(uniform(1))
        for octave in range(2, 7):
            grid = uniform(1, 1, 2**octave, 2**octave) - 0.5
            share += power**octave * functional.interpolate(grid, (_SIZE, _SIZE), mode="bicubic")[0, 0]
        share = 0.5 + share / (6 * share.std())
    elif kind == "stripes":
        share = ((across * count) % 1 < 0.2 + 0.6 * float(uniform(1))).float()
    elif kind == "checks":
        share = (((across * count).floor() + (along * count).floor()) % 2).float()
    else:
        where = uniform(40, 2)
        nearest = torch.cdist(torch.stack((y, x), -1).view(-1, 2), where).amin(1).view(_SIZE, _SIZE)
        share = (nearest < 0.02 + 0.06 * float(uniform(1))).float()
    first, second = uniform(3, 1, 1), uniform(3, 1, 1)
    return (first + (second - first) * share.clamp(0, 1)).clamp(0, 1)
