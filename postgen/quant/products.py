"""Products of rounded inputs with a packed weight, and which of them a device computes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from postgen.kernels.fp8 import E4M3, E4M3_MAX, SMALLEST_SCALE
from postgen.kernels.fp8_blocks import ops as blocks
from postgen.kernels.fp8_rows import ops as fp8
from postgen.kernels.hadamard_rows.ops import rotate_quantize
from postgen.kernels.int8 import INT8_MAX
from postgen.kernels.int8_rows import ops as int8
from postgen.kernels.weight_expand.ops import expand, expand_planes
from postgen.quant.formats import SQUARE, Format
from postgen.quant.grids import FloatGrid, IntGrid
from postgen.quant.packing import unpack_scales
from postgen.quant.rotation import rotated
from postgen.quant.rounding import Scales, codes_of, grouped, represented, scales_of, ungrouped
from postgen.quant.spec import LayerSpec

Mode = Literal["dequant", "fp8", "int8", "sim"]
"""How a layer computes: "dequant" multiplies the exact input with the expanded weight; "fp8" and "int8" multiply 8-bit
numbers; "sim" rounds the input and multiplies as "dequant", for formats and devices without such a product."""

Rows = tuple[Tensor, Tensor]
"""8-bit codes (..., K) in E4M3 or int8, and float32 scales of the rows (..., 1)."""


def modes(spec: LayerSpec) -> tuple[Mode, ...]:
    """Return the modes in which a layer can compute on some device, the fastest first.

    A weight in another format than the mode's is expanded to 8-bit numbers with one scale per row, which rounds a
    second time.
    """
    weight, act = spec.weight, spec.act
    if act is None:
        return ("dequant",)
    if weight is None:
        return ("sim",)
    if act.name == "fp8" and (act.share == "row" or act.share == weight.share == "block"):
        return ("fp8", "sim")
    if act.name == "int8" and act.share == "row" and not act.asymmetric:
        return ("int8", "sim")
    return ("sim",)


def mode_for(spec: LayerSpec, shape: tuple[int, int], device: torch.device) -> Mode:
    """Return the fastest mode in which a layer with a weight of this shape (N, K) computes on a device."""
    first = modes(spec)[0]
    if first == "int8":
        return "int8" if device.type == "cuda" else "sim"
    if first != "fp8":
        return first
    in_blocks = spec.act is not None and spec.act.share == "block"
    reason = blocks.why_not_blocks(device) if in_blocks else fp8.why_not_fp8(device)
    return "sim" if reason is not None or any(size % fp8.MULTIPLE for size in shape) else "fp8"


def rounded(x: Tensor, format: Format, clip: Tensor | None = None) -> Tensor:
    """Round an activation to a format, with scales from its values.

    Args:
        x: (..., K).
        format: the format; "block" shares scales over 128 channels of a token.
        clip: factor of the range of each group, a tensor that broadcasts against x; None: 1.

    Returns:
        The numbers that the codes represent, in the shape and dtype of x.
    """
    if format.share == "block":
        format = replace(format, share=SQUARE)
    groups = grouped(x, format)
    # The groups have an axis more than x.
    scales = scales_of(groups, format, clip=1.0 if clip is None else clip[..., None])
    found = represented(codes_of(groups, scales, format), scales, format)
    return ungrouped(found, format, tuple(x.shape)).to(x.dtype)


def expanded(packed: Mapping[str, Tensor], format: Format, channels: int, dtype: torch.dtype) -> Tensor:
    """Return the numbers (N, K) of a packed weight.

    Args:
        packed: tensors of `packing.pack`.
        format: the number format.
        channels: the number K.
        dtype: dtype of the result.
    """
    return _expanded(packed, unpack_scales(packed, format), format, channels, None, dtype)


def eight_bits(packed: Mapping[str, Tensor], format: Format, channels: int, dtype: torch.dtype) -> Rows:
    """Return a packed weight as 8-bit numbers with one scale per row.

    Args:
        packed, format, channels: as for `expanded`.
        dtype: E4M3 or int8. A weight with such codes and one scale per row is returned as it is.
    """
    scales = unpack_scales(packed, format)
    if format.share == "row" and format.scale == "float32" and _native(format) == dtype:
        return packed["weight"].view(dtype), scales.scale.flatten(1)
    most = _largest(scales, format)
    if format.share == "block":
        most = most.repeat_interleave(SQUARE, 0)
    rows = packed["weight"].shape[-2]
    most = most[:rows].expand(rows, 1).contiguous()
    row_scale = (most / (E4M3_MAX if dtype == E4M3 else INT8_MAX)).clamp_min(SMALLEST_SCALE)
    return _expanded(packed, scales, format, channels, row_scale, dtype), row_scale


def input_rows(x: Tensor, spec: LayerSpec, signs: Tensor | None, clip: Tensor | None, dtype: torch.dtype) -> Rows:
    """Rotate an input and round its rows.

    Args:
        x: (..., K).
        spec: how the layer is quantised.
        signs: (K,) signs of the rotation, or None.
        clip: factor of the range of each row, or None.
        dtype: E4M3 or int8.
    """
    if clip is None and spec.rotate:
        codes, scale = rotate_quantize(x, spec.rotate, signs, dtype)
        return codes, scale
    if clip is not None:
        x = rotated(x, spec.rotate, signs)
        # A clamped row has the clipped range.
        most = x.abs().amax(-1, keepdim=True) * clip
        x = x.clamp(-most, most)
    codes, scale = fp8.quantize_rows(x) if dtype == E4M3 else int8.quantize_rows(x)
    return codes, scale


def rows_product(x: Rows, weight: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the product of 8-bit rows and a weight (N, K) with a scale per row, plus the bias, in `dtype`."""
    multiply = fp8.rows_matmul if weight[0].dtype == E4M3 else int8.rows_matmul
    found: Tensor = multiply(*x, *weight, bias, dtype)
    return found


def blocks_product(x: Tensor, packed: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the product of x (..., K), rounded to E4M3 by 128 channels, and an fp8:block weight, plus the bias."""
    codes, scale = blocks.quantize_parts(x)
    weight, scales = packed["weight"].view(E4M3), packed["weight_scale"].view(torch.float32)
    found: Tensor = blocks.blocks_matmul(codes, scale, weight, scales, bias, dtype)
    return found


def _expanded(
    packed: Mapping[str, Tensor],
    scales: Scales,
    format: Format,
    channels: int,
    row_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    codes, bits = packed["weight"], format.grid.bits
    found: Tensor
    if format.planes:
        coefficients = packed["weight_scale"].view(torch.bfloat16)
        found = expand_planes(codes, coefficients, row_scale, channels, dtype)
        return found
    native = _native(format)
    table = None
    if native == E4M3:
        codes = codes.view(E4M3)
    elif isinstance(format.grid, FloatGrid):
        table = _table(format.grid, codes.device)
    zero = None if scales.zero is None else scales.zero.squeeze(-1)
    signed = isinstance(format.grid, IntGrid) and not format.grid.unsigned
    found = expand(codes, scales.step.squeeze(-1), zero, table, row_scale, bits, channels, signed, dtype)
    return found


def _native(format: Format) -> torch.dtype | None:
    """Return the 8-bit dtype that has the codes of a format, if there is one."""
    if format.planes or format.grid.bits != 8 or format.asymmetric:
        return None
    return E4M3 if isinstance(format.grid, FloatGrid) else torch.int8


def _largest(scales: Scales, format: Format) -> Tensor:
    """Return bounds of the absolute values of rows that have their own scales, (rows, 1), from the scales alone."""
    if format.planes:
        constant, rest = scales.scale[..., :1], scales.scale[..., 1:]
        high = (constant + rest.clamp_min(0).sum(-1, keepdim=True)).abs()
        low = (constant + rest.clamp_max(0).sum(-1, keepdim=True)).abs()
        return torch.maximum(high, low).squeeze(-1).amax(-1, keepdim=True)
    grid = format.grid
    if scales.zero is None:
        most = scales.step.abs() * grid.largest
    else:
        most = scales.step.abs() * torch.maximum((grid.largest - scales.zero).abs(), (grid.least - scales.zero).abs())
    return most.squeeze(-1).amax(-1, keepdim=True)


@functools.cache
def _table(grid: FloatGrid, device: torch.device) -> Tensor:
    """Return the numbers of all codes of a grid; the table is kept on the device, because a copy would wait."""
    return grid.decode(torch.arange(2**grid.bits, dtype=torch.uint8)).to(device)
