"""Previews of latents without decoding: a linear map from latents to RGB colours, fitted to the autoencoder.

A preview costs one matrix product per frame, while decoding takes as long as several denoising steps. Shapes and
colours are right, but details are missing: a preview has one pixel per latent pixel, which is 8 x 8 pixels of the
video in most models.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from postgen.compat import execution_device
from postgen.families.streaming import denormalised
from postgen.families.streams import DECODERS

_SIDE, _FRAMES = 12, 3
"""Height and width, and number of frames, of the random latents that are decoded for the first fit."""
_CONTRAST = 0.12
"""Standard deviation of the colours of an ordinary clip. Decoded random latents are nearly grey."""
_FIRST_WEIGHT = 0.05
"""Weight of the first fit relative to a real clip. It is small because random latents do not look like a video."""
_FADE = 0.5
"""Factor on the weight of older clips whenever a new clip is added to the fit."""


class LatentColours:
    """The linear map from the latents of one autoencoder to colours.

    Args:
        vae: an autoencoder whose class is in `DECODERS`.
        device: the device on which the autoencoder computes; None is the device of its weights.
    """

    def __init__(self, vae: Any, device: torch.device | str | None = None) -> None:
        self.time_first = DECODERS[type(vae).__name__].time_first
        channels = int(vae.config.get("z_dim") or vae.config.get("latent_channels"))
        self.channels = channels
        self._products = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
        self._targets = torch.zeros(channels + 1, 3, dtype=torch.float64)
        self._map = torch.zeros(channels + 1, 3)
        self.learnt = False
        """Whether the map was fitted to a finished clip; before that, brightness is right and colours are wrong."""
        self._begin(vae, vae.device if device is None else torch.device(device))

    def fits(self, latents: Tensor) -> bool:
        """Whether latents have the shape of this autoencoder: (1, C, t, h, w), or (1, t, C, h, w) for CogVideoX."""
        return latents.ndim == 5 and latents.shape[2 if self.time_first else 1] == self.channels

    def clip(self, latents: Tensor) -> Tensor:
        """Return the preview of latents: a clip (t, 3, h, w) in [0, 1], float32 on the CPU; grey before `learn`.

        Args:
            latents: latents for which `fits` returns True.
        """
        rows = self._rows(latents)
        colours = rows.float().cpu() @ self._map
        frames, height, width = self._sizes(latents)
        if not self.learnt:
            colours = colours.mean(1, keepdim=True).expand(-1, 3)
        return colours.view(frames, height, width, 3).permute(0, 3, 1, 2).clamp(0, 1)

    def learn(self, latents: Tensor, clip: Tensor) -> None:
        """Add a finished clip to the fit. Later clips have more weight.

        Nothing changes if the clip has one latent frame, or if its frames do not match the latent frames.

        Args:
            latents: latents of the clip, for which `fits` returns True.
            clip: the decoded clip, (F, 3, H, W) in [0, 1].
        """
        frames, height, width = self._sizes(latents)
        if frames < 2 or (len(clip) - 1) % (frames - 1):
            return
        each = (len(clip) - 1) // (frames - 1)
        later = clip[1:].float().cpu().view(frames - 1, each, *clip.shape[1:]).mean(1)
        small = functional.adaptive_avg_pool2d(torch.cat([clip[:1].float().cpu(), later]), (height, width))
        self._add(self._rows(latents), small.permute(0, 2, 3, 1).reshape(-1, 3))
        self.learnt = True

    def _begin(self, vae: Any, device: torch.device) -> None:
        """Fit the map to decoded random latents, with the contrast of an ordinary clip."""
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(1, self.channels, _FRAMES, _SIDE, _SIDE, generator=generator).to(device, vae.dtype)
        with torch.no_grad():
            decoded = vae.decode(denormalised(vae, latents), return_dict=False)[0]
        clip = (decoded[0].float() * 0.5 + 0.5).clamp(0, 1).transpose(0, 1).cpu()
        latents = latents.transpose(1, 2) if self.time_first else latents
        self.learn(latents, clip)
        self.learnt = False
        shown = self._rows(latents).cpu() @ self._map
        gain = _CONTRAST / float((shown - shown.mean(0)).std().clamp(min=1e-4))
        # Raise the contrast: move the targets away from their mean, which is in the row of the constant input.
        mean = self._targets[-1:] / self._products[-1:, -1:]
        constant = self._products[:, -1:] * mean
        self._targets = constant + gain * (self._targets - constant)
        self._products *= _FIRST_WEIGHT
        self._targets *= _FIRST_WEIGHT
        self._fit()

    def _add(self, rows: Tensor, colours: Tensor) -> None:
        rows, colours = rows.double().cpu(), colours.double()
        self._products = _FADE * self._products + rows.T @ rows / len(rows)
        self._targets = _FADE * self._targets + rows.T @ colours / len(rows)
        self._fit()

    def _fit(self) -> None:
        # Ridge regression: a clip with few colours does not determine all directions of the map.
        ridge = 1e-3 * self._products.diagonal().mean() * torch.eye(len(self._products), dtype=torch.float64)
        self._map = torch.linalg.solve(self._products + ridge, self._targets).float()

    def _rows(self, latents: Tensor) -> Tensor:
        """Return the inputs of the map, (t h w, C + 1) float32: the channels of each latent pixel and a constant 1."""
        last = latents[0].movedim(1 if self.time_first else 0, -1).reshape(-1, self.channels)
        return functional.pad(last.float(), (0, 1), value=1.0)

    def _sizes(self, latents: Tensor) -> tuple[int, int, int]:
        frames = latents.shape[1 if self.time_first else 2]
        return frames, latents.shape[-2], latents.shape[-1]


_known: WeakKeyDictionary[Any, LatentColours] = WeakKeyDictionary()


def latent_colours(pipe: Any) -> LatentColours | None:
    """Return the map for a pipeline's autoencoder, or None if the class of the autoencoder is not in `DECODERS`.

    The first call for an autoencoder makes the map, for which it decodes a few small frames.
    """
    vae = getattr(pipe, "vae", None)
    if type(vae).__name__ not in DECODERS:
        return None
    if vae not in _known:
        _known[vae] = LatentColours(vae, execution_device(pipe))
    return _known[vae]
