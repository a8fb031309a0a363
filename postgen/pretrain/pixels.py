"""An `AutoencoderKL` whose latents are the pixels, so that a stock latent pipeline generates small pictures directly.

Nothing is trained. The image x is carried in channels x and -x, and silu(z) - silu(-z) = z cancels the nonlinearity.
Two channels with the constants +M and -M keep the deviation of the group norm at M / 2 (eight channels whose sum is
0), almost independently of x; its relative change is of order x^2 / M^2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_CHANNELS = 8
_LARGE = 1000.0
"""M."""
_LOG_VARIANCE = -30.0


def pixel_autoencoder() -> Any:
    """Return an `AutoencoderKL` whose latents (B, 3, H, W) equal the pictures in [-1, 1] to about 1e-5."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(_CHANNELS,),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=1,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        for part in (vae.encoder, vae.decoder):
            for module in part.modules():
                if isinstance(last := getattr(module, "conv2", None), nn.Conv2d):
                    for weight in last.parameters():
                        weight.zero_()  # the residual block adds nothing
            _carry(part.conv_in, part.conv_norm_out, part.conv_out)
    return vae.requires_grad_(False).eval()


def _carry(into: Any, norm: Any, out: Any) -> None:
    """Set the first and last layers of encoder or decoder: x, -x and the constants at its input, x at its output."""
    for layer in (into, out):
        layer.weight.zero_()
        layer.bias.zero_()
    for channel in range(3):
        into.weight[channel, channel, 1, 1], into.weight[3 + channel, channel, 1, 1] = 1, -1
        out.weight[channel, channel, 1, 1], out.weight[channel, 3 + channel, 1, 1] = 1, -1
    into.bias[6], into.bias[7] = _LARGE, -_LARGE
    norm.weight.fill_(_LARGE / 2)
    norm.bias.zero_()
    if len(out.bias) > 3:
        out.bias[3:] = _LOG_VARIANCE  # log variance of the encoder: almost no noise
