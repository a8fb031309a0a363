"""Wan's causal autoencoder on a whole clip at once: `AutoencoderKLWan` without its loop over chunks.

diffusers' `encode` and `decode` process a clip four frames at a time with a cache of past features. For training this
means thousands of small launches. Every layer except the temporal resampling is causal, so one pass computes the same
values. Unlike the stock decoder, no clamp stops the gradient at -1 and 1. Shapes: (B, C, T, H, W), T = 4n + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.kernels.norm_silu import naive
from postgen.kernels.norm_silu.ops import norm_silu_pad


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """Return the SiLU of the RMS norm over channels (dim 1), in float32 or wider; gamma has shape (C,1,1,1)."""
    return naive.norm_silu(x, gamma.flatten())


class WholeClip(nn.Module):
    """Whole-clip `encode` and `decode` with the weights of an `AutoencoderKLWan`, which are shared, not copied.

    Args:
        vae: the autoencoder; residual blocks (`is_residual=True`, Wan 2.2) are not supported.
        folded: compute a 3x3x3 convolution as a 2-D convolution over three stacked frames; often faster for few
            channels.
        compiled: fuse norm and activation with `torch.compile`. If neither `folded` nor `compiled` is set,
            `postgen.kernels.norm_silu` computes norm, activation and padding.
        align: pad the channels of the pixels with zeros to a multiple of this number; 32 is fast on GPUs.

    Raises:
        UserError: an autoencoder with residual blocks.
    """

    def __init__(self, vae: Any, *, folded: bool = False, compiled: bool = False, align: int = 1) -> None:
        super().__init__()
        if vae.config.is_residual:
            raise UserError("WholeClip supports autoencoders with is_residual=False (Wan 2.1) only.")
        # Use the names of the autoencoder, so that its weight files fit.
        self.encoder, self.decoder = vae.encoder, vae.decoder
        self.quant_conv, self.post_quant_conv = vae.quant_conv, vae.post_quant_conv
        self.patch = int(vae.config.patch_size or 1)
        self.folded = folded
        # Without matrix-product shortcuts and 32 pixel channels, one weight gradient took cuDNN 150 ms on an H200.
        self.plain, self.align = folded or compiled, align
        self._norm_silu: Callable[[Tensor, Tensor], Tensor] = norm_silu
        if compiled:
            self._norm_silu = torch.compile(norm_silu, dynamic=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the unclamped reconstruction of a clip in [-1,1] from sampled latents, and their mean and logvar."""
        mean, logvar = self.encode(x)
        noise = torch.randn_like(mean)
        return self.decode(mean + noise * (0.5 * logvar).exp()), mean, logvar

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance (B, z, 1 + (T-1)/4, h, w), not normalised; the log variance is in [-30, 20]."""
        if (x.shape[2] - 1) % 4:
            raise UserError(f"A clip for this autoencoder must have 4n+1 frames, got {x.shape[2]}.")
        encoder: Any = self.encoder
        h = self._conv_in(encoder.conv_in, self._patchify(x))
        for block in encoder.down_blocks:
            h = self._down(block, h) if hasattr(block, "resample") else self._residual(block, h)
        h = self._middle(encoder.mid_block, h)
        h = self._norm_conv(encoder.norm_out, encoder.conv_out, h)
        mean, logvar = self._wide(self.quant_conv(h)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """Return the clip (B, 3, T, H, W), about in [-1,1], of latents that are not normalised."""
        decoder: Any = self.decoder
        h = self.post_quant_conv(z).contiguous(memory_format=torch.channels_last_3d)
        h = self._middle(decoder.mid_block, self._conv(decoder.conv_in, h))
        for block in decoder.up_blocks:
            for layer in block.resnets:
                h = self._residual(layer, h)
            if block.upsamplers is not None:
                h = self._up(block.upsamplers[0], h)
        h = self._norm_conv(decoder.norm_out, decoder.conv_out, h)
        return self._wide(self._unpatchify(h))

    @staticmethod
    def _wide(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.float()

    def _norm_conv(self, norm: Any, conv: Any, x: Tensor) -> Tensor:
        if self.plain:
            return self._conv(conv, self._norm_silu(x, norm.gamma))
        # The input is padded already; the layer's own forward pass would pad it again.
        return self._aligned(conv, norm_silu_pad(x, norm.gamma.flatten()))

    def _conv_in(self, conv: Any, x: Tensor) -> Tensor:
        if self.plain:
            return self._conv(conv, x.contiguous(memory_format=torch.channels_last_3d))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = F.pad(x, (*naive.PADDING, 0, -x.shape[1] % self.align))
        return self._aligned(conv, x.contiguous(memory_format=torch.channels_last_3d))

    def _aligned(self, conv: Any, padded: Tensor) -> Tensor:
        weight, bias, missing = conv.weight, conv.bias, -conv.out_channels % self.align
        if missing or padded.shape[1] != weight.shape[1]:
            weight = F.pad(weight, (*(0,) * 7, padded.shape[1] - weight.shape[1], 0, missing))
            bias = F.pad(bias, (0, missing))
        return F.conv3d(padded, weight, bias)[:, : conv.out_channels]

    def _conv(self, conv: Any, x: Tensor) -> Tensor:
        if not self.folded or conv.kernel_size != (3, 3, 3):
            return conv(x)  # type: ignore[no-any-return]
        frames = x.shape[2]
        padded = F.pad(x, (0, 0, 0, 0, 2, 0)).transpose(1, 2)
        stacked = torch.cat([padded[:, i : i + frames] for i in range(3)], dim=2).flatten(0, 1)
        weight = conv.weight.transpose(1, 2).flatten(1, 2)
        y = F.conv2d(stacked.contiguous(memory_format=torch.channels_last), weight, conv.bias, padding=1)
        clip: Tensor = y.unflatten(0, (-1, frames)).transpose(1, 2)
        return clip

    def _residual(self, block: Any, x: Tensor) -> Tensor:
        shortcut = self._shortcut(block.conv_shortcut, x)
        h = self._norm_conv(block.norm1, block.conv1, x)
        return self._norm_conv(block.norm2, block.conv2, h) + shortcut

    def _shortcut(self, conv: Any, x: Tensor) -> Tensor:
        if self.plain or not isinstance(conv, nn.Conv3d):
            return conv(x)  # type: ignore[no-any-return]
        # A convolution with a 1x1x1 kernel is a matrix product.
        return F.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)

    def _middle(self, block: Any, x: Tensor) -> Tensor:
        x = self._residual(block.resnets[0], x)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            x = self._residual(resnet, attention(x))
        return x

    def _down(self, layer: Any, x: Tensor) -> Tensor:
        x = _per_frame(layer.resample, x)
        if layer.mode == "downsample3d" and x.shape[2] > 1:
            x = torch.cat((x[:, :, :1], layer.time_conv(x)), dim=2)
        return x

    def _up(self, layer: Any, x: Tensor) -> Tensor:
        if layer.mode == "upsample3d" and x.shape[2] > 1:
            pairs = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
            later = torch.stack((pairs[:, 0], pairs[:, 1]), dim=3).flatten(2, 3)
            x = torch.cat((x[:, :, :1], later), dim=2)
        return _per_frame(lambda pictures: layer.resample[1](_larger(layer.resample[0], pictures)), x)

    def _patchify(self, x: Tensor) -> Tensor:
        p = self.patch
        b, c, t, height, width = x.shape
        cells = x.reshape(b, c, t, height // p, p, width // p, p)
        return cells.permute(0, 1, 6, 4, 2, 3, 5).reshape(b, c * p * p, t, height // p, width // p)

    def _unpatchify(self, x: Tensor) -> Tensor:
        p = self.patch
        b, channels, t, height, width = x.shape
        cells = x.reshape(b, channels // (p * p), p, p, t, height, width)
        return cells.permute(0, 1, 4, 5, 3, 6, 2).reshape(b, channels // (p * p), t, height * p, width * p)


def _larger(upsample: Any, pictures: Tensor) -> Tensor:
    if pictures.dtype not in (torch.bfloat16, torch.float16):
        return upsample(pictures)  # type: ignore[no-any-return]
    # Copying pixels needs no float32, to which the layer's own forward pass converts.
    return F.interpolate(pictures, scale_factor=upsample.scale_factor, mode=upsample.mode)


def _per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    frames = x.shape[2]
    pictures = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    clip: Tensor = layer(pictures).unflatten(0, (-1, frames)).transpose(1, 2)
    return clip
