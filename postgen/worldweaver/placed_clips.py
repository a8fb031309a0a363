"""Compute the sights of placed memory for whole training clips before the first step.

For every latent frame at which a window may begin, `PlacedMemory` holds all earlier frames and no later ones, as in a
rollout. Its sight of the following frames is stored, so a training step only needs to gather latents.

A rollout has no exact depth but only the depth that its own latents decode to. Therefore the sights use depth that was
encoded and decoded by the autoencoder, without values near black or white, and disturbed by a smooth random field for
each clip.
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
"""Number of random values of the field along an edge of the picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placing:
    """Settings of the sights of clips."""

    ahead: int
    """Number of coming frames in each sight."""
    warp: bool = True
    """As in `PlacedMemory`."""
    depth_noise: float = 0.1
    """Largest standard deviation of the field that is added to the logarithm of depth. Each clip draws its own from 0
    to this value."""

    @property
    def told(self) -> list[object]:
        """Settings on which stored sights depend, in addition to the clips."""
        return [self.ahead, self.warp, self.depth_noise]

    @torch.no_grad()
    def sights(
        self, model: WorldWeaverModel, latents: Tensor, limits: DisparityRange, poses: Tensor, seeds: Sequence[int]
    ) -> Tensor:
        """Return the sights of clips, see `sights_of`.

        Args:
            model: decodes the depth latents.
            latents: (B, C, T, h, w) depth latents without the latent scale.
            limits: disparity range of the clips.
            poses: (B, T, 3, 4) cameras of the latent frames.
            seeds: seed of the disturbance of each clip.
        """
        # Decode as "rgb", because the scale of RGB is 1 and these depth latents are not scaled.
        picture = model.decode(latents.float(), "rgb")
        step = (picture.shape[1] - 1) // max(1, latents.shape[2] - 1)
        depth = limits.distance(picture[:, :: max(1, step)])
        depth = disturbed(depth, self.depth_noise, seeds)
        return sights_of(depth, poses, (latents.shape[3], latents.shape[4]), self.ahead, warp=self.warp)


def sights_of(depth: Tensor, poses: Tensor, grid: tuple[int, int], ahead: int, *, warp: bool = True) -> Tensor:
    """Return the sights (B, T, P, 3, h, w) of the P frames from each frame on, given all earlier frames.

    Args:
        depth: (B, T, H, W) distances of the last pixel frame of each latent frame, infinite where unknown.
        poses: (B, T, 3, 4) cameras.
        grid: (h, w), number of cells of a latent frame.
        ahead: P.
        warp: as in `PlacedMemory`.
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
    """Multiply depth (B, T, H, W) by exp(a f): f is a smooth field, half constant in time, a is from [0, most]."""
    rows = []
    for clip, seed in zip(depth, seeds, strict=True):
        chance = torch.Generator().manual_seed(seed_of(seed, "window"))
        amount = most * float(torch.rand((), generator=chance))
        still, each = (torch.randn(count, 1, _FIELD, _FIELD, generator=chance) for count in (1, len(clip)))
        field = interpolate((still + each) / 2**0.5, clip.shape[-2:], mode="bilinear")[:, 0]
        rows.append(clip * (amount * field).exp().to(clip))
    return torch.stack(rows)
