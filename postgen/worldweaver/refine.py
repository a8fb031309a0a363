"""Refine depth and flow outputs of the transformer at the resolution of single latents.

A token of the transformer is a patch of latents of all modalities. Its features describe what the frame shows, and a
pretrained model uses them to pass on the noise of RGB. They have no capacity left for the noise of further channels,
and frozen weights learn little of it. At low noise, where the values of single latents matter most, the output is
therefore hardly better than the linear guess of `skip`. A few convolutions over the latents combine the output of the
transformer with the values of the latents.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, silu

from postgen.worldweaver.levels import FrameLevels, Role

_BLOCKS = 2
_CONTRAST = 0.25
"""Expected difference of a clean latent from its neighbours, for latents with a deviation of about 1."""
_FREQUENCIES = 8
"""Number of sines, and of cosines, for each noise level."""


class Refiner(nn.Module):
    """Convolutions over the latents of a frame and of the frame before it.

    Frames that are not adjacent in time do not see each other: long memory, and the frame that follows it. The last
    layer is initialised with zeros.

    Args:
        modalities: M, 2 or 3.
        channels: C, channels of one modality.
        width: channels of the convolutions.
    """

    def __init__(self, modalities: int, channels: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        made = channels * (modalities - 1)
        # Inputs: output and contrast of each modality but RGB, denoised RGB, and the noisy latents of both frames.
        self.first = nn.Conv2d(2 * made + channels * (1 + 2 * modalities), width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(_BLOCKS))
        self.last = nn.Conv2d(width, made, 3, padding=1)
        self.told = nn.Sequential(nn.Linear(4 * _FREQUENCIES * modalities, width), nn.SiLU())
        # Scale and shift for every block and for the last layer.
        self.levels = nn.Linear(width, 2 * width * (_BLOCKS + 1))
        for weight in (*self.levels.parameters(), *self.last.parameters()):
            nn.init.zeros_(weight)

    def forward(self, out: Tensor, z: Tensor, levels: FrameLevels) -> Tensor:
        """Return the correction to the transformer's depth and flow outputs, (B, (M - 1) * C, T, h, w).

        Args:
            out: (B, M * C, T, h, w) outputs of the transformer: the velocity of RGB, and the input of `with_skip` for
                the other modalities.
            z: (B, M * C, T, h, w) noisy latents.
            levels: noise levels and roles of the T frames.
        """
        sigma, dtype = levels.sigma.to(z.device, torch.float32), self.last.weight.dtype
        level = sigma.movedim(2, 1).repeat_interleave(self.channels, 1)[..., None, None]
        rgb, others = out.float().tensor_split([self.channels], 1)
        # Detach RGB, so that only the RGB loss trains the RGB output.
        clean = z[:, : self.channels] - level[:, : self.channels] * rgb.detach()
        noisy = z * ((1 - level).square() + level.square()).rsqrt()
        differences = contrast(z[:, self.channels :], level[:, self.channels :])
        before, sigma_before = _before(noisy, sigma, levels.role.to(z.device))
        seen = torch.cat([others, differences, clean, noisy, before], 1).transpose(1, 2).flatten(0, 1).to(dtype)
        # No autocast: at low noise small differences between latents matter, and bfloat16 would round them away.
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
    """Return the difference of each latent from the mean of its 3 x 3 neighbourhood, (B, c, T, h, w).

    The difference is divided by its expected size at the noise level. At low noise the raw difference is tiny, and
    without the division the weights that use it would first have to grow large.
    """
    around = avg_pool2d(z.flatten(1, 2), 3, 1, 1, count_include_pad=False).view_as(z)
    return (z - around) * (level.square() + ((1 - level) * _CONTRAST).square()).rsqrt()


def _before(z: Tensor, sigma: Tensor, role: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each frame the latents and noise levels of the frame before it.

    Zeros with a noise level of 1 stand for a missing frame: before the first frame, and wherever one of the two frames
    is long memory, whose frames are not consecutive.
    """
    known = role != Role.LONG
    near = (known[1:] & known[:-1])[:, None]
    latents = torch.where(near[..., None], z[:, :, :-1], 0)
    told = torch.where(near, sigma[:, :-1], 1)
    return torch.cat([torch.zeros_like(z[:, :, :1]), latents], 2), torch.cat([torch.ones_like(sigma[:, :1]), told], 1)
