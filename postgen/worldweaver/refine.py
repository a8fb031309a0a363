"""What a transformer's tokens have no room for: depth and flow compared with their neighbours, latent by latent.

A token of the transformer is a patch of latents of all modalities. Its features say what the frame shows there, and
were trained to hand on the noise of RGB; for that of further channels they have no room, and little is learned into
frozen weights. So where there is little noise, when the cells' own values matter most, the guess of `skip` is all that
comes out. A few convolutions over the latents bring both together: what the transformer says, and what the cells hold.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, silu

from postgen.worldweaver.levels import FrameLevels, Role

_BLOCKS = 2
_CONTRAST = 0.25
"""How much cells of clean latents, whose deviation is about 1, are taken to differ from their neighbours."""
_FREQUENCIES = 8
"""Sines, and as many cosines, of each level."""


class Refiner(nn.Module):
    """Convolutions over the cells of a latent frame, which also see those of the frame before it.

    Frames of the window that are not neighbours in time, which long memory and what follows it are, do not see each
    other. The last layer begins with zeros.

    Args:
        modalities: M, 2 or 3.
        channels: C, of one modality.
        width: of the convolutions.
    """

    def __init__(self, modalities: int, channels: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        made = channels * (modalities - 1)
        # Of each modality but RGB what the transformer says and how cells differ; RGB without its noise; both frames.
        self.first = nn.Conv2d(2 * made + channels * (1 + 2 * modalities), width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(_BLOCKS))
        self.last = nn.Conv2d(width, made, 3, padding=1)
        self.told = nn.Sequential(nn.Linear(4 * _FREQUENCIES * modalities, width), nn.SiLU())
        # Scale and shift before every block, and before the last layer.
        self.levels = nn.Linear(width, 2 * width * (_BLOCKS + 1))
        for weight in (*self.levels.parameters(), *self.last.parameters()):
            nn.init.zeros_(weight)

    def forward(self, out: Tensor, z: Tensor, levels: FrameLevels) -> Tensor:
        """Return (B, (M - 1) * C, T, h, w), what to add to the transformer's outputs of depth and flow.

        Args:
            out: (B, M * C, T, h, w) the transformer's outputs: RGB's velocity, and what `with_skip` takes of others.
            z: (B, M * C, T, h, w) noisy latents.
            levels: of the T frames.
        """
        sigma, dtype = levels.sigma.to(z.device, torch.float32), self.last.weight.dtype
        level = sigma.movedim(2, 1).repeat_interleave(self.channels, 1)[..., None, None]
        rgb, others = out.float().tensor_split([self.channels], 1)
        # No gradients into RGB, which is trained by its own loss alone.
        clean = z[:, : self.channels] - level[:, : self.channels] * rgb.detach()
        noisy = z * ((1 - level).square() + level.square()).rsqrt()
        differences = contrast(z[:, self.channels :], level[:, self.channels :])
        before, sigma_before = _before(noisy, sigma, levels.role.to(z.device))
        seen = torch.cat([others, differences, clean, noisy, before], 1).transpose(1, 2).flatten(0, 1).to(dtype)
        # Differences of cells matter where noise is low; bfloat16 would take them.
        with torch.autocast(z.device.type, enabled=False):
            waves = get_timestep_embedding(torch.cat([sigma, sigma_before], 2).flatten() * 1000, 2 * _FREQUENCIES)
            told = self.levels(self.told(waves.view(len(seen), -1).to(dtype)))[..., None, None]
            *each, (scale, shift) = (part.chunk(2, 1) for part in told.chunk(_BLOCKS + 1, 1))
            x = self.first(seen)
            for block, by in zip(self.blocks, each, strict=True):
                x = block(x, *by)
            x = self.last(x * (1 + scale) + shift)
        added: Tensor = x.unflatten(0, sigma.shape[:2]).transpose(1, 2)
        return added.to(out)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        added: Tensor = self.second(silu(self.first(silu(x * (1 + scale) + shift))))
        return x + added


def contrast(z: Tensor, level: Tensor) -> Tensor:
    """Return (B, c, T, h, w), how cells differ from the mean of 3 x 3, in units of what is expected of the level.

    Of little noise that is much, while in the latents themselves it is next to nothing: weights that look for it would
    have to become large first.
    """
    around = avg_pool2d(z.flatten(1, 2), 3, 1, 1, count_include_pad=False).view_as(z)
    return (z - around) * (level.square() + ((1 - level) * _CONTRAST).square()).rsqrt()


def _before(z: Tensor, sigma: Tensor, role: Tensor) -> tuple[Tensor, Tensor]:
    """Return the latents and levels of the frame before each; zeros, as if all noise, where there is none."""
    known = role != Role.LONG
    near = (known[1:] & known[:-1])[:, None]
    latents = torch.where(near[..., None], z[:, :, :-1], 0)
    told = torch.where(near, sigma[:, :-1], 1)
    return torch.cat([torch.zeros_like(z[:, :, :1]), latents], 2), torch.cat([torch.ones_like(sigma[:, :1]), told], 1)
