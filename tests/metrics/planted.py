"""A clip for tests of drift: two squares on a smooth background, one of which leaves the picture and returns."""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.metrics import drift
from postgen.metrics.drift import TrueClip

FRAMES, HEIGHT, WIDTH = 40, 21, 27
RED, BLUE, GREEN = (0.9, 0.1, 0.1), (0.1, 0.2, 0.9), (0.1, 0.7, 0.2)
GONE = range(14, 24)
"""Frames in which the blue body is out of the picture."""


def place(frame: int, body: int) -> tuple[slice, slice] | None:
    if body == 1 and frame in GONE:
        return None
    left = (frame % 10) + (14 if body else 0)
    return slice(2 + 10 * body, 9 + 10 * body), slice(left, min(left + 6, WIDTH))


def planted() -> TrueClip:
    """Return the clip: a red and a blue square on smooth grey, with 10 different camera poses and equal views."""
    ground = torch.nn.functional.interpolate(
        0.4 + 0.2 * torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
        size=(HEIGHT, WIDTH),
        mode="bicubic",
    )[0]
    frames = ground.expand(FRAMES, 3, -1, -1).clone()
    ids = torch.zeros(FRAMES, HEIGHT, WIDTH, dtype=torch.uint8)
    disparity = torch.full((FRAMES, HEIGHT, WIDTH), 0.1)
    for frame in range(FRAMES):
        for body, colour in enumerate((RED, BLUE)):
            if (box := place(frame, body)) is not None:
                frames[frame][:, *box] = torch.tensor(colour)[:, None, None]
                ids[frame][box], disparity[frame][box] = body + 1, 0.25 * (body + 1)
    v, u = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    texels = torch.where((ids == 0)[:, None], torch.stack((u, v)).expand(FRAMES, -1, -1, -1), torch.nan)
    poses = (torch.arange(FRAMES) % 20 - 10).abs()[:, None].float()
    palette = torch.tensor([RED, BLUE, GREEN])
    return TrueClip(frames=frames, ids=ids, palette=palette, poses=poses, disparity=disparity, texels=texels)


def erased(true: TrueClip, body: int, gone: range) -> Tensor:
    """Return the frames with a body replaced by grey in the frames `gone`."""
    frames = true.frames.clone()
    for frame in gone:
        frames[frame][:, true.ids[frame] == body + 1] = 0.5
    return frames


def permanence(frames: Tensor, true: TrueClip) -> drift.Permanence:
    return drift.object_permanence(drift.detect(frames, true.palette), true.ids)
