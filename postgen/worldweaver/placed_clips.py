"""Placed memory for training: sights of whole clips, before the first step.

For every latent frame at which a window may begin, `PlacedMemory` has stored all frames before it and none after, as
in a rollout, and is asked where the next frames find their cells. So a step of training only gathers latents.

A rollout has no exact depth, only what its own latents decode to. So these sights are made of depth that went through
the autoencoder too, cut where its picture is black or white, and disturbed: each clip by a smooth field of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from postgen.sampling.seeds import seed_of

from .depth import DisparityRange
from .model import WorldWeaverModel
from .placed import PlacedMemory

_FIELD = 4
"""Values of the disturbance along an edge of the picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placing:
    """What is asked for of clips."""

    ahead: int
    """Coming frames that are looked at."""
    warp: bool = True
    """As of `PlacedMemory`."""
    depth_noise: float = 0.1
    """The logarithm of depth is off by a field whose standard deviation is drawn from 0 to this for each clip."""

    @property
    def told(self) -> list[object]:
        """What kept sights depend on, beside the clips."""
        return [self.ahead, self.warp, self.depth_noise]

    @torch.no_grad()
    def sights(
        self, model: WorldWeaverModel, latents: Tensor, limits: DisparityRange, poses: Tensor, seeds: Sequence[int]
    ) -> Tensor:
        """Return the sights of clips, see `sights_of`.

        Args:
            model: decodes.
            latents: (B, C, T, h, w) of depth, not scaled.
            limits: of their disparity.
            poses: (B, T, 3, 4) cameras of the latents.
            seeds: of the disturbance of each clip.
        """
        # As the autoencoder gave them: those of RGB are not scaled.
        picture = model.decode(latents.float(), "rgb")
        step = (picture.shape[1] - 1) // max(1, latents.shape[2] - 1)
        depth = limits.distance(picture[:, :: max(1, step)])
        depth = disturbed(depth, self.depth_noise, seeds)
        return sights_of(depth, poses, (latents.shape[3], latents.shape[4]), self.ahead, warp=self.warp)


def sights_of(depth: Tensor, poses: Tensor, grid: tuple[int, int], ahead: int, *, warp: bool = True) -> Tensor:
    """Return the sights (B, T, P, 3, h, w) of P coming frames from every frame of clips on, which is not stored yet.

    Args:
        depth: (B, T, H, W) distances of the last pixel frame of each latent frame, infinite where there is none.
        poses: (B, T, 3, 4) cameras.
        grid: h and w, cells of a latent frame.
        ahead: P.
        warp: as of `PlacedMemory`.
    """
    rows, total = depth.shape[:2]
    found = torch.zeros(rows, total, ahead, 3, *grid, device=depth.device)
    found[:, :, :, 0] = -1
    memory = PlacedMemory(mem_noise=0.0, modalities=1, warp=warp)
    blank = torch.zeros(rows, 1, 1, *grid, device=depth.device)
    for start in range(1, total):
        memory.add(blank, depth[:, start - 1 : start], poses[:, start - 1 : start], start - 1)
        seen = memory.find(poses[:, start : start + ahead])
        if seen is not None:
            found[:, start, : seen.shape[1]] = seen
    return found


def disturbed(depth: Tensor, most: float, seeds: Sequence[int]) -> Tensor:
    """Return depth (B, T, H, W) times exp(a f): f is smooth, half of it stays in time; a is from 0 to `most`."""
    rows = []
    for clip, seed in zip(depth, seeds, strict=True):
        chance = torch.Generator().manual_seed(seed_of(seed, "window"))
        amount = most * float(torch.rand((), generator=chance))
        still, each = (torch.randn(count, 1, _FIELD, _FIELD, generator=chance) for count in (1, len(clip)))
        field = interpolate((still + each) / 2**0.5, clip.shape[-2:], mode="bilinear")[:, 0]
        rows.append(clip * (amount * field).exp().to(clip))
    return torch.stack(rows)
