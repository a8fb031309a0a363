"""Rounding of a tensor to a number format: scales from the data, codes, and the numbers that they represent.

The last axis holds the input channels; it is split into groups that share a scale. For a group with values x:

    symmetric    s = max|x| / largest,              q = round(x / s)          ~x = q s
    asymmetric   s = (max x - min x) / (2^b - 1),   z = round(-min x / s),
                 q = clip(round(x / s) + z)                                   ~x = (q - z) s
                 where max x >= 0 and min x <= 0, so z is one of the codes
    E8M0         s = 2^ceil(log2(max|x| / largest)) (or the OCP rule)
    E4M3         s = s_b s_t,  s_t = max|X| / (448 largest) of the tensor,  s_b = E4M3(max|x| / largest / s_t)
    bit planes   ~x = c_0 + sum_i c_i B_i with B_i in {0, 1} (arXiv:2602.04163)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from postgen.errors import UserError, shown
from postgen.kernels.fp8 import E4M3, E4M3_MAX, SMALLEST_SCALE
from postgen.quant.formats import SQUARE, Format, Rule
from postgen.quant.grids import FloatGrid

LEAST_EXPONENT, LARGEST_EXPONENT = -126, 127
"""Range of the exponents of E8M0 scales. The format has 2^-127 too, but its inverse times a number may overflow and
float32 holds it only as a subnormal number, which some devices flush to 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """The scales of the groups of a tensor.

    Shapes are those of the grouped tensor (..., groups, group), see `grouped`, with axes of size 1 where a scale is
    shared.
    """

    scale: Tensor
    """Float32 (..., groups, 1); for bit planes the coefficients (..., groups, k + 1), the constant c_0 first."""
    zero: Tensor | None = None
    """Zero points of asymmetric formats, float32 in the shape of `scale`. Whole numbers, except while they train."""
    whole: Tensor | None = None
    """The float32 scale s_t of the tensor (scalar), for formats with E4M3 scales; `scale` is s_b then."""

    @property
    def step(self) -> Tensor:
        """The step between neighbouring numbers of the grid: `scale`, times `whole` where there is one."""
        return self.scale if self.whole is None else self.scale * self.whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """A quantised tensor: numbers of the element grid, and scales."""

    values: Tensor
    """Numbers of the grid, float32 (..., groups, group); plane patterns 0 ... 2^k - 1 for bit planes."""
    scales: Scales
    format: Format
    shape: tuple[int, ...]
    """Shape of the tensor before grouping."""

    def numbers(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the numbers that the codes represent, in the shape of the tensor before quantisation."""
        found = represented(self.values, self.scales, self.format)
        return ungrouped(found, self.format, self.shape).to(dtype)


def grouped(x: Tensor, format: Format) -> Tensor:
    """Split the last axis into groups: (..., K) -> (..., K / group, group), float32.

    "tensor" and "row" give one group of K. "block" groups a matrix (N, K) to (N/128, K/128, 128 * 128); N is filled up
    with zeros.

    Raises:
        UserError: the format's group does not divide K.
    """
    size = format.group(x.shape[-1])
    x = x.float()
    if format.share != "block":
        return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % SQUARE))
    tiles = x.reshape(x.shape[0] // SQUARE, SQUARE, x.shape[1] // SQUARE, SQUARE)
    return tiles.transpose(1, 2).flatten(2)


def ungrouped(x: Tensor, format: Format, shape: tuple[int, ...]) -> Tensor:
    """Return a grouped tensor in its shape before `grouped`."""
    if format.share != "block":
        return x.reshape(shape)
    tiles = x.reshape(x.shape[0], x.shape[1], SQUARE, SQUARE).transpose(1, 2)
    return tiles.reshape(x.shape[0] * SQUARE, -1)[: shape[0]].reshape(shape)


def scales_of(
    x: Tensor,
    format: Format,
    *,
    clip: Tensor | float = 1.0,
    clip_low: Tensor | float | None = None,
    whole: Tensor | None = None,
) -> Scales:
    """Compute scales from the range of the data.

    Args:
        x: the grouped tensor, see `grouped`.
        format: any format but bit planes.
        clip: factor of the largest value of each group before the scale is computed (LWC's gamma); a number, or a
            tensor that broadcasts against (..., groups, 1).
        clip_low: factor of the smallest value (LWC's beta), asymmetric formats only; None is `clip`.
        whole: the scale s_t of the tensor, formats with E4M3 scales only; None computes it from x.
    """
    if format.asymmetric:
        axes = (-1,) if format.share != "tensor" else tuple(range(x.dim()))
        # The range always holds 0, so that the zero point is one of the codes and fits into their bits.
        high = x.amax(axes, keepdim=True).clamp_min(0) * clip
        low = x.amin(axes, keepdim=True).clamp_max(0) * (clip if clip_low is None else clip_low)
        scale = ((high - low) / format.grid.largest).clamp_min(SMALLEST_SCALE)
        return Scales(scale=scale, zero=(-low / scale).round())
    largest = x.abs().amax(-1, keepdim=True) if format.share != "tensor" else x.abs().amax().reshape((1,) * x.dim())
    largest = largest * clip
    if format.scale == "e8m0":
        return Scales(scale=power_of_two(largest, format, format.rule))
    if format.scale == "e4m3":
        if whole is None:
            whole = (largest.amax() / (E4M3_MAX * format.grid.largest)).clamp_min(SMALLEST_SCALE)
        # A block of zeros keeps the scale 0: its codes are 0 as well.
        small = (largest / format.grid.largest / whole).clamp(0, E4M3_MAX).to(E4M3).float()
        return Scales(scale=small, whole=whole)
    return Scales(scale=(largest / torch.full_like(largest, format.grid.largest)).clamp_min(SMALLEST_SCALE))


def power_of_two(largest: Tensor, format: Format, rule: Rule = "rceil") -> Tensor:
    """Return E8M0 scales of groups with the given largest absolute values, float32."""
    if rule == "floor":
        exponent = largest.frexp().exponent - 1 - format.grid.exponent
    else:
        # frexp: x = m 2^e with m in [.5, 1), so the smallest power of two that is not below x is 2^e, or x itself.
        mantissa, exponent = (largest / torch.full_like(largest, format.grid.largest)).frexp()
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = torch.where(largest > 0, exponent, LEAST_EXPONENT).clamp(LEAST_EXPONENT, LARGEST_EXPONENT)
    return torch.ldexp(torch.ones_like(largest), exponent)


def codes_of(x: Tensor, scales: Scales, format: Format) -> Tensor:
    """Round a grouped tensor to the grid under given scales; the numbers of the grid, float32."""
    if format.planes:
        return (x[..., None] - levels_of(scales.scale)[..., None, :]).abs().argmin(-1).float()
    step = scales.step
    # A scale of 0 (a block of zeros in an NV format) means that all its numbers are 0.
    scaled = torch.where(step > 0, x / torch.where(step > 0, step, 1), 0)
    if scales.zero is None:
        return format.grid.round(scaled)
    return (scaled.round() + scales.zero).clamp(format.grid.least, format.grid.largest)


def represented(values: Tensor, scales: Scales, format: Format) -> Tensor:
    """Return the numbers that numbers of the grid represent under given scales, in the grouped shape."""
    if format.planes:
        return torch.take_along_dim(levels_of(scales.scale), values.long(), -1)
    return (values if scales.zero is None else values - scales.zero) * scales.step


def levels_of(coefficients: Tensor) -> Tensor:
    """Return the numbers of bit planes, (..., k + 1) coefficients -> (..., 2^k); plane i belongs to bit i - 1."""
    planes = coefficients.shape[-1] - 1
    patterns = torch.arange(2**planes, device=coefficients.device)
    bits = (patterns[:, None] >> torch.arange(planes, device=patterns.device)) & 1
    return coefficients[..., :1] + coefficients[..., 1:] @ bits.to(coefficients.dtype).T


def quantize_tensor(x: Tensor, format: Format, scales: Scales | None = None) -> Quantized:
    """Quantise a tensor: round to nearest.

    Args:
        x: a weight (N, K) or an activation (..., K), any floating-point dtype.
        format: the number format. Bit planes begin with evenly spaced numbers between the extremes of each group.
        scales: scales to use; None computes them from x.

    Raises:
        UserError: the format's group does not divide K, or x is a model.
    """
    if not isinstance(x, Tensor):
        raise UserError(
            f"quantize_tensor rounds a tensor, got {shown(type(x).__name__)}: postgen.quant.quantize quantises a model"
        )
    x_grouped = grouped(x, format)
    if scales is None:
        scales = _even_planes(x_grouped, format) if format.planes else scales_of(x_grouped, format)
    values = codes_of(x_grouped, scales, format)
    return Quantized(values=values, scales=scales, format=format, shape=tuple(x.shape))


def _even_planes(x: Tensor, format: Format) -> Scales:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / format.grid.largest
    return Scales(scale=torch.cat([low, *(step * 2**plane for plane in range(format.planes))], -1))


def qsnr(x: Tensor, rounded: Tensor) -> float:
    """Return the signal-to-noise ratio of a rounding, -10 log10(||x - ~x||^2 / ||x||^2), in dB (arXiv:2510.25602)."""
    noise = (x.double() - rounded.double()).square().sum()
    signal = x.double().square().sum()
    return math.inf if noise == 0 else float(-10 * torch.log10(noise / signal))


def as_format(quantized: Quantized, scales: Scales) -> Quantized:
    """Return the same codes with other scales."""
    return replace(quantized, scales=scales)


def is_float(format: Format) -> bool:
    """Whether the elements are floating-point numbers."""
    return isinstance(format.grid, FloatGrid)
