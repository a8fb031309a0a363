"""Parts that the layer types share: feature maps, rotary embedding, sums over keys, joint divisor, convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from postgen.kernels.dispatch import for_triton
from postgen.kernels.grid_convolution.ops import grid_convolution, takes
from postgen.kernels.qk_norm_rope.ops import qk_norm_rope

if TYPE_CHECKING:
    from postgen.families import Grid
    from postgen.families.attention.reading import Rope


def exact(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if it is float64: sums over tokens are too imprecise in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def by_frame_and_head(x: Tensor, frames: int) -> Tensor:
    """Return x (B, N, H, D) as (B, F, S, H, D) in the dtype of `exact`, with the tokens of a head contiguous in
    memory.

    With this memory layout, matrix products over the tokens of a frame need no copy.
    """
    heads = x.unflatten(1, (frames, -1)).transpose(2, 3)
    dtype = torch.promote_types(x.dtype, torch.float32)
    laid_out: Tensor = heads.to(dtype, memory_format=torch.contiguous_format)
    return laid_out.transpose(2, 3)


def no_autocast(x: Tensor) -> torch.autocast:
    """Return a context that switches autocast off on the device of x, so that products inside keep their precision."""
    return torch.autocast(x.device.type, enabled=False)


def feature(x: Tensor, name: str) -> Tensor:
    """Return relu(x) if `name` is relu, else elu(x) + 1."""
    return x.relu() if name == "relu" else F.elu(x) + 1


def centered(key: Tensor) -> Tensor:
    """Return keys (B, N, H, D) minus their mean over the tokens (arXiv:2605.02772)."""
    # `mean` sums in float32 without a float32 copy of the keys.
    dtype = torch.promote_types(key.dtype, torch.float32)
    return key - key.mean(dim=1, keepdim=True, dtype=dtype).to(key.dtype)


def merged(x: Tensor, heads: int) -> Tensor:
    """Merge each group of `heads` neighbouring heads of x (B, N, H, D) into one, (B, N, H / heads, heads * D)."""
    return x if heads == 1 else x.unflatten(2, (-1, heads)).flatten(3)


def rotate(x: Tensor, rope: Rope | None) -> Tensor:
    """Apply rotary embedding to the channel pairs (2i, 2i + 1) of x, (B, N, H, D), in the dtype of x.

    If x has merged heads, each original head inside is rotated on its own.
    """
    if rope is None:
        return x
    cos, sin = rope.cos.to(x.dtype), rope.sin.to(x.dtype)
    pairs = x.shape[-1] // 2
    if pairs != cos.shape[-1]:
        cos, sin = (_merged_table(table, pairs // cos.shape[-1]) for table in (cos, sin))
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def rotate_both(query: Tensor, key: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor]:
    """Return `rotate` of queries and keys of one shape, (B, N, H, D), in one fused kernel where it is available."""
    if rope is None or query.shape[-1] != 2 * rope.cos.shape[-1] or not for_triton(query, key):
        return rotate(query, rope), rotate(key, rope)
    turned_query, turned_key = qk_norm_rope(query, key, cos=rope.cos, sin=rope.sin, norm="none")
    return turned_query, turned_key


def _merged_table(table: Tensor, heads: int) -> Tensor:
    return table.repeat(1, 1, 1, heads) if table.shape[2] == 1 else merged(table, heads)


def linear_parts(query: Tensor, key: Tensor, value: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor]:
    """Return the numerator (B, N, H, D) and the divisor (B, N, H) of linear attention over all keys.

    With the rotary embedding R, S = sum_j R_j k_j v_j^T and k' = sum_j k_j, the numerator is R_i q_i S and the divisor
    is q_i . k' (arXiv:2509.24695). The divisor is not rotated, because a sum of rotated features may cross zero.

    Args:
        query: features after the feature map, not rotated, (B, N, H, D).
        key: features of the keys, not rotated, (B, N, H, D).
        value: (B, N, H, D), in the dtype of the features.
        rope: the rotary embedding of queries and keys; None for none.
    """
    turned_query, turned_key = rotate_both(query, key, rope)
    with no_autocast(value):
        state = torch.einsum("bmhd,bmhe->bhde", turned_key, value)
        return (
            torch.einsum("bnhd,bhde->bnhe", turned_query, state),
            torch.einsum("bnhd,bhd->bnh", query, key.sum(dim=1)),
        )


def joined(soft: Tensor, lse: Tensor, numerator: Tensor, divisor: Tensor) -> Tensor:
    """Combine softmax attention over some keys and linear attention over the others under one divisor, (B, N, H, D).

    y = (e^lse soft + numerator) / (e^lse + divisor) (arXiv:2509.24899, arXiv:2601.04342). Both sides of the fraction
    are multiplied by e^-c with c = max(0, lse). This avoids overflow and does not change the value.

    Args:
        soft: output of softmax attention, (B, N, H, D).
        lse: logarithm of the softmax divisor, (B, H, N).
        numerator: numerator of the linear part, (B, N, H, D).
        divisor: divisor of the linear part, at least 0, (B, N, H).
    """
    lse = lse.transpose(1, 2)[..., None]
    level = lse.clamp(min=0).detach()
    near, far = (lse - level).exp(), (-level).exp()
    return (near * exact(soft) + far * numerator) / (near + far * divisor[..., None])


class LearnedMap(nn.Module):
    """A learned feature map per head with positive outputs (arXiv:2509.24899).

    Two linear layers with softplus; then the channels are split into `parts`, and part p is raised to the power p.
    """

    def __init__(self, heads: int, channels: int, parts: int = 2) -> None:
        super().__init__()
        self.parts = parts
        self.first = nn.Parameter(torch.empty(heads, channels, channels))
        self.second = nn.Parameter(torch.empty(heads, channels, channels))
        self.bias = nn.Parameter(torch.zeros(heads, channels))
        with torch.no_grad():
            # Near the identity. The new map is then close to softplus, which already tells keys apart.
            for weight in (self.first, self.second):
                weight.normal_(std=0.02).add_(torch.eye(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feature map to queries or keys (B, N, H, D); same shape, in float32 (float64 stays)."""
        with no_autocast(x):
            first, second, bias = exact(self.first), exact(self.second), exact(self.bias)
            hidden = F.softplus(torch.einsum("bnhd,hde->bnhe", exact(x), first))
            out = F.softplus(torch.einsum("bnhd,hde->bnhe", hidden, second) + bias)
        first_power, *others = out.tensor_split(self.parts, dim=-1)
        return torch.cat([first_power, *(part**power for power, part in enumerate(others, 2))], dim=-1)


class FixedMap(nn.Module):
    """A feature map without weights: relu(x) or elu(x) + 1."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Map x to features, (B, N, H, D)."""
        return feature(exact(x), self.name)


def feature_map(name: str, heads: int, channels: int) -> nn.Module:
    """Return a new feature map: learned, relu or elu."""
    return LearnedMap(heads, channels) if name == "learned" else FixedMap(name)


class GridConvolution(nn.Module):
    """Depth-wise convolutions of tokens in their grid: one within each frame, one along time (LiT, guideline 1).

    Heads share no weights. The padding outside the grid is zero.

    Args:
        channels: H * D.
        space: kernel side within a frame, odd; 0 for none.
        time: kernel length along time, odd; 0 for none.
        causal: whether the convolution along time reads earlier frames only.
        init: zero, or default for the initialisation that torch gives a convolution.
    """

    def __init__(self, channels: int, space: int, time: int, *, causal: bool = False, init: str = "zero") -> None:
        super().__init__()
        self.causal, self.init = causal, init
        self.space = nn.Parameter(torch.empty(channels, space, space)) if space else None
        self.time = nn.Parameter(torch.empty(channels, time)) if time else None
        with torch.no_grad():
            for weight in self.parameters():
                side = weight[0].numel() ** -0.5
                weight.zero_() if init == "zero" else weight.uniform_(-side, side)

    @property
    def taps_before(self) -> int:
        """Number of earlier frames that a causal convolution along time reads."""
        return 0 if self.time is None else self.time.shape[1] - 1

    def in_space(self, x: Tensor, grid: Grid, *, added: bool = False) -> Tensor:
        """Convolve tokens within each frame.

        Args:
            x: tokens, (B, N, H, D).
            grid: the grid of these tokens.
            added: whether to add x to the result.

        Returns:
            (B, N, H, D). Without weights: x if `added`, else a scalar 0.
        """
        out: Tensor = self("space", x, grid, added)
        return out

    def forward(self, part: str, *args: Any) -> Any:
        """Run one part: space, time or weights.

        All three go through a call of the module, because offloading hooks load the weights only during a call. Code
        that reads a weight outside a call would see memory without values.
        """
        parts: dict[str, Callable[..., Any]] = {
            "space": self._in_space,
            "time": self._in_time,
            "weights": self._weights,
        }
        return parts[part](*args)

    def weights(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the weights within frames (H * D, side, side) and along time (H * D, length), for a fused kernel.

        None stands for a convolution that the layer does not have.
        """
        out: tuple[Tensor | None, Tensor | None] = self("weights")
        return out

    def _weights(self) -> tuple[Tensor | None, Tensor | None]:
        return self.space, self.time

    def _in_space(self, x: Tensor, grid: Grid, added: bool) -> Tensor:
        if self.space is None:
            return x if added else x.new_zeros(())
        if takes(x):
            return grid_convolution(x, self.space, None, _sizes(grid), added=added)
        pictures = x.reshape(-1, grid.height, grid.width, x.shape[2] * x.shape[3]).permute(0, 3, 1, 2)
        out = F.conv2d(pictures, self.space.to(x.dtype)[:, None], padding="same", groups=len(self.space))
        out = out.permute(0, 2, 3, 1).reshape(x.shape)
        return x + out if added else out

    def in_time(self, x: Tensor, grid: Grid, before: Tensor | None = None, *, added: bool = False) -> Tensor:
        """Convolve tokens along time.

        Args:
            x: tokens, (B, N, H, D).
            grid: the grid of these tokens.
            before: the tokens of the `taps_before` frames before x, (B, taps_before * S, H, D), for a causal
                convolution in a stream; None pads with zeros.
            added: whether to add x to the result.

        Returns:
            (B, N, H, D). Without weights: x if `added`, else a scalar 0.
        """
        out: Tensor = self("time", x, grid, before, added)
        return out

    def _in_time(self, x: Tensor, grid: Grid, before: Tensor | None, added: bool) -> Tensor:
        if self.time is None:
            return x if added else x.new_zeros(())
        if not self.causal and takes(x):
            return grid_convolution(x, None, self.time, _sizes(grid), added=added)
        taps, places = self.time.shape[1], grid.height * grid.width
        strips = x.reshape(x.shape[0], grid.frames, places, -1).permute(0, 3, 1, 2)
        if before is not None:
            strips = torch.cat([before.reshape(x.shape[0], taps - 1, places, -1).permute(0, 3, 1, 2), strips], dim=2)
        elif self.causal:
            strips = F.pad(strips, (0, 0, taps - 1, 0))
        padding = (0 if self.causal else taps // 2, 0)
        out = F.conv2d(strips, self.time.to(x.dtype)[:, None, :, None], padding=padding, groups=len(self.time))
        out = out.permute(0, 2, 3, 1).reshape(x.shape)
        return x + out if added else out


def _sizes(grid: Grid) -> tuple[int, int, int]:
    return grid.frames, grid.height, grid.width
