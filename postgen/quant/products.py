"""Products of rounded inputs with a quantised weight, and which of them a device computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from postgen.kernels.fp8 import E4M3, SMALLEST_SCALE
from postgen.kernels.fp8_rows.ops import MULTIPLE, quantize_rows, rows_matmul, why_not_fp8
from postgen.quant.formats import SQUARE, Format
from postgen.quant.grids import IntGrid
from postgen.quant.rounding import Quantized, codes_of, grouped, represented, scales_of, ungrouped
from postgen.quant.spec import LayerSpec

Mode = Literal["dequant", "fp8", "int8", "sim"]
"""How a layer computes: "dequant" multiplies the exact input with the expanded weight; "fp8" and "int8" multiply 8-bit
numbers; "sim" rounds the input and multiplies as "dequant", for formats and devices without such a product."""

Rows = tuple[Tensor, Tensor]
"""8-bit codes (..., K), and float32 scales of the rows (..., 1)."""


def modes(spec: LayerSpec) -> tuple[Mode, ...]:
    """Return the modes in which a layer can compute on some device, the fastest first.

    A weight in another format than the mode's is expanded to 8-bit numbers with one scale per row, which rounds a
    second time.
    """
    if spec.act is None:
        return ("dequant",)
    by_row = spec.act.share == "row" and spec.act.scale == "float32" and spec.weight is not None
    if by_row and spec.act.name == "fp8":
        return ("fp8", "sim")
    if by_row and spec.act.name == "int8" and not spec.act.asymmetric:
        return ("int8", "sim")
    return ("sim",)


def mode_for(spec: LayerSpec, shape: tuple[int, int], device: torch.device) -> Mode:
    """Return the fastest mode in which a layer with a weight of this shape (N, K) computes on a device."""
    first = modes(spec)[0]
    fits = device.type == "cuda" and not any(size % MULTIPLE for size in shape)
    if first == "fp8":
        return "fp8" if fits and why_not_fp8(device) is None else "sim"
    if first == "int8":
        return "int8" if fits else "sim"
    return first


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


def clipped(x: Tensor, clip: Tensor | None) -> Tensor:
    """Clamp rows of x to a factor of their largest absolute value, so that a scale from the data is clipped by it."""
    if clip is None:
        return x
    most = x.abs().amax(-1, keepdim=True) * clip
    return x.clamp(-most, most)


def fp8_rows(quantized: Quantized) -> Rows:
    """Return a weight as E4M3 codes with one scale per row."""
    if quantized.format.name == "fp8" and quantized.format.share == "row":
        return quantized.values.flatten(1).to(E4M3), quantized.scales.scale.flatten(1)
    codes, scale = quantize_rows(quantized.numbers())
    return codes, scale


def int8_rows(quantized: Quantized) -> Rows:
    """Return a weight as int8 codes with one scale per row."""
    format = quantized.format
    if format.share == "row" and isinstance(format.grid, IntGrid) and not format.asymmetric:
        return quantized.values.flatten(1).to(torch.int8), quantized.scales.scale.flatten(1)
    return to_int8(quantized.numbers())


def to_int8(x: Tensor) -> Rows:
    """Round the rows of x (..., K) to -127 ... 127."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    scale = (largest / torch.full_like(largest, 127.0)).clamp_min(SMALLEST_SCALE)
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


def fp8_product(x: Tensor, weight: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the product of x (..., K), rounded to E4M3 per row, and a weight (N, K), plus the bias, in `dtype`."""
    codes, scale = quantize_rows(x)
    found: Tensor = rows_matmul(codes, scale, *weight, bias, dtype)
    return found


def int8_product(x: Tensor, weight: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the product of x (..., K), rounded to int8 per row, and a weight (N, K), plus the bias, in `dtype`."""
    codes, scale = to_int8(x)
    found = (codes.float() @ weight[0].float().T) * scale * weight[1].flatten()
    return (found if bias is None else found + bias.float()).to(dtype)
