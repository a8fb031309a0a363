"""One training pass of the autoencoder, from bytes to the loss; a module, so that processes can average gradients."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .clip_loss import clip_loss, edges
from .fast_step import GraphedCall, uncached_autocast
from .pool import dilated, to_model
from .whole_clip import WholeClip


class LossSettings(Protocol):
    """The settings that a pass reads from a configuration."""

    object_weight: float
    edge_weight: float
    first_frame_weight: float
    mse_weight: float
    gradient_weight: float
    gradient_scales: int
    kl_weight: float


class ClipPass(WholeClip):
    """A `WholeClip` whose forward pass returns the loss and the metrics of a batch of clips.

    Args:
        vae: the autoencoder.
        settings: weights of the loss.
        every_gradient: give every parameter a gradient, zero where a pass does not use it (a single frame uses no
            temporal convolution). Recorded graphs and gradient averages over processes need this.
        graphs: replay forward and backward passes as CUDA graphs, see `GraphedCall`.
        options: keyword arguments of `WholeClip`.
    """

    MEASURES = ("kl", "mse", "mse_objects", "mse_objects_first")

    def __init__(
        self, vae: Any, settings: LossSettings, *, every_gradient: bool = False, graphs: bool = False, **options: Any
    ) -> None:
        super().__init__(vae, **options)
        self._settings, self._every_gradient = settings, every_gradient
        self._pass = GraphedCall(self._measured, {"autoencoder": self}) if graphs else self._measured

    def forward(self, rgb_BT3HW: Tensor, mask_BTHW: Tensor, noise: Tensor) -> Tensor:  # type: ignore[override]
        """Return (1 + len(MEASURES),): the loss, and the metrics without gradients.

        Args:
            rgb_BT3HW: the clips as uint8.
            mask_BTHW: uint8, 1 on bodies.
            noise: standard normal noise of the shape of the latents.
        """
        with uncached_autocast(rgb_BT3HW.device.type):
            return self._pass(rgb_BT3HW, mask_BTHW, noise)

    def record(self, batch: int, frames: int, size: int, device: torch.device) -> None:
        """Record the CUDA graphs of a shape, before processes share the parameters; their traffic would disturb it.

        Args:
            batch, frames, size: number, length and side of the square clips.
            device: a GPU.
        """
        rgb = torch.zeros((batch, frames, 3, size, size), dtype=torch.uint8, device=device)
        latent = (batch, self.encoder.conv_out.out_channels // 2, 1 + (frames - 1) // 4, size // 8, size // 8)
        self(rgb, rgb[:, :, 0].contiguous(), torch.zeros(latent, device=device))

    def _measured(self, rgb: Tensor, mask_BTHW: Tensor, noise: Tensor) -> Tensor:
        settings = self._settings
        x, mask = to_model(rgb), dilated(mask_BTHW)[:, None]
        mean, logvar = self.encode(x)
        y = self.decode(mean + noise * (0.5 * logvar).exp())
        weight = pixel_weight(x, mask, settings)
        loss = clip_loss(x, y, weight, settings.mse_weight, settings.gradient_weight, settings.gradient_scales)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        loss = loss + settings.kl_weight * kl
        if self._every_gradient and x.shape[2] == 1:
            unused = [value.sum() for name, value in self.named_parameters() if "time_conv" in name]
            loss = loss + 0.0 * torch.stack(unused).sum()
        square = (y - x).detach().square()
        objects, first = square * mask, slice(1)
        measures = (
            kl.detach(),
            square.mean(),
            objects.sum() / (mask.sum() * 3).clamp_min(1),
            objects[:, :, first].sum() / (mask[:, :, first].sum() * 3).clamp_min(1),
        )
        return torch.stack((loss, *measures))


def pixel_weight(x: Tensor, mask: Tensor, settings: LossSettings) -> Tensor:
    """Return the weight (B,1,T,H,W) of each pixel, 1 on average.

    Args:
        x: clip (B,3,T,H,W) in [-1,1].
        mask: (B,1,T,H,W), 1 on and around bodies.
        settings: weights of bodies, edges and first frames.
    """
    weight = 1.0 + settings.object_weight * mask
    if settings.edge_weight:
        weight = weight + settings.edge_weight * mask * edges(x)
    if settings.first_frame_weight != 1.0 and x.shape[2] > 1:
        weight = torch.cat((weight[:, :, :1] * settings.first_frame_weight, weight[:, :, 1:]), 2)
    return weight / weight.mean()
