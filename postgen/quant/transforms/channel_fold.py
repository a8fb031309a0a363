"""Fold a quantiser with a scale and zero point per channel into one with a single scale and zero point.

Stage 2 of I&S-ViT (arXiv:2311.10126): activations after a norm are first quantised channel-wise, with (s_c, z_c),
while the weights are exact. With the means s~ and z~ over the channels,

    x_c / s_c + z_c = x'_c / s~ + z~   for   x'_c = (x_c - d_c) / r_c,   r_c = s_c / s~,   d_c = s_c (z~ - z_c),

so a fold of the scale r and shift d (`postgen.quant.transforms.let`) gives the same codes with one scale and one zero
point. Nothing is lost, because the weights of the next layer are exact until stage 3.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from postgen.errors import UserError
from postgen.quant.transforms.let import fold_
from postgen.quant.transforms.points import FoldPoint


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelFold:
    """The fold of a channel-wise quantiser into a layer-wise one."""

    scale: Tensor
    """Scale r of the fold (C,)."""
    shift: Tensor
    """Shift d of the fold (C,)."""
    layer_scale: Tensor
    """Scale s~ of the quantiser after the fold, a scalar."""
    layer_zero: Tensor
    """Zero point z~ after the fold, a scalar. It is not rounded: the codes are round(x' / s~ + z~)."""


def channel_fold(scale: Tensor, zero: Tensor) -> ChannelFold:
    """Return the fold of a quantiser with codes round(x / scale + zero).

    Args:
        scale: scale of each channel (C,), positive.
        zero: zero point of each channel (C,).

    Raises:
        UserError: the shapes differ, or a scale is not positive.
    """
    if scale.dim() != 1 or scale.shape != zero.shape:
        raise UserError(
            f"scale has shape {tuple(scale.shape)} and zero {tuple(zero.shape)}: both need one number for each channel"
        )
    scale, zero = scale.detach().float(), zero.detach().float()
    if not bool((scale > 0).all()):
        raise UserError(f"a scale is {float(scale.min()):.3g}: all scales must be positive")
    layer_scale, layer_zero = scale.mean(), zero.mean()
    return ChannelFold(
        scale=scale / layer_scale, shift=scale * (layer_zero - zero), layer_scale=layer_scale, layer_zero=layer_zero
    )


def fold_channels_(model: nn.Module, point: FoldPoint, scale: Tensor, zero: Tensor) -> ChannelFold:
    """Fold a channel-wise quantiser of a tensor into the model, and return the quantiser that is left.

    Args:
        model: the model or block of the point.
        point: a point that can be shifted.
        scale, zero: as for `channel_fold`.

    Raises:
        UserError: the values do not fit the point. Nothing changes.
    """
    found = channel_fold(scale, zero)
    fold_(model, point, found.scale, found.shift)
    return found
