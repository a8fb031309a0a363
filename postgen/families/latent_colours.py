"""Colours of latents without decoding them: a linear map that is fitted to the autoencoder, for previews.

One matrix product a frame, where a decode takes as long as several denoising steps. Shapes and colours are right,
details are not there: one pixel for each latent, 8 x 8 pixels of the video in most models.
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
"""Rows and columns, and frames, of the random latents that are decoded for the first fit."""
_CONTRAST = 0.12
"""Standard deviation of the colours of an ordinary clip. Those of random latents are nearly grey."""
_FIRST_WEIGHT = 0.05
"""Of that fit beside what is learnt of a real clip: random latents look like no video."""
_FADE = 0.5
"""What is left of older clips when another one is learnt of."""


class LatentColours:
    """Latents of one autoencoder -> colours.

    Args:
        vae: an autoencoder of `DECODERS`.
        device: where it computes.
    """

    def __init__(self, vae: Any, device: torch.device | str | None = None) -> None:
        self.time_first = DECODERS[type(vae).__name__].time_first
        channels = int(vae.config.get("z_dim") or vae.config.get("latent_channels"))
        self.channels = channels
        self._products = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
        self._targets = torch.zeros(channels + 1, 3, dtype=torch.float64)
        self._map = torch.zeros(channels + 1, 3)
        self.learnt = False
        """Whether a finished clip was learnt of: before, light and dark are right, and colours are not."""
        self._begin(vae, vae.device if device is None else torch.device(device))

    def fits(self, latents: Tensor) -> bool:
        """Whether latents have the shape of this autoencoder's: (1, C, t, h, w), or (1, t, C, h, w) for CogVideoX."""
        return latents.ndim == 5 and latents.shape[2 if self.time_first else 1] == self.channels

    def clip(self, latents: Tensor) -> Tensor:
        """Return a small clip (t, 3, h, w) in [0, 1], float32 on the CPU, of latents that fit; grey before `learn`."""
        rows = self._rows(latents)
        colours = rows.float().cpu() @ self._map
        frames, height, width = self._sizes(latents)
        if not self.learnt:
            colours = colours.mean(1, keepdim=True).expand(-1, 3)
        return colours.view(frames, height, width, 3).permute(0, 3, 1, 2).clamp(0, 1)

    def learn(self, latents: Tensor, clip: Tensor) -> None:
        """Fit the map to a finished clip too; later clips count more.

        Args:
            latents: that fit, of the clip.
            clip: (F, 3, H, W) in [0, 1].
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
        """Fit the map to what the autoencoder makes of random latents."""
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
        # The targets of the fit, further from their mean, which the row of the constant holds.
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
        # A little towards zero: a clip of few colours leaves directions without a word.
        ridge = 1e-3 * self._products.diagonal().mean() * torch.eye(len(self._products), dtype=torch.float64)
        self._map = torch.linalg.solve(self._products + ridge, self._targets).float()

    def _rows(self, latents: Tensor) -> Tensor:
        """Return (t h w, C + 1): latents, and a one."""
        last = latents[0].movedim(1 if self.time_first else 0, -1).reshape(-1, self.channels)
        return functional.pad(last.float(), (0, 1), value=1.0)

    def _sizes(self, latents: Tensor) -> tuple[int, int, int]:
        frames = latents.shape[1 if self.time_first else 2]
        return frames, latents.shape[-2], latents.shape[-1]


_known: WeakKeyDictionary[Any, LatentColours] = WeakKeyDictionary()


def latent_colours(pipe: Any) -> LatentColours | None:
    """Return the map of a pipeline's autoencoder, made once for each; None for an autoencoder that is not known here.

    Making it decodes a few small frames.
    """
    vae = getattr(pipe, "vae", None)
    if type(vae).__name__ not in DECODERS:
        return None
    if vae not in _known:
        _known[vae] = LatentColours(vae, execution_device(pipe))
    return _known[vae]
