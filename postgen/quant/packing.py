"""Packed tensors of a quantised weight: bit patterns of its codes, and bit patterns of its scales.

Loaders cast floating-point tensors to the dtype of the model, so float32 scales are stored as int32 views.

    weight        codes of b bits as a little-endian bit stream along the K input channels, uint8 (N, ceil(K b / 8)):
                  code i of a row has the bits b i ... b i + b - 1, and bit j of a row is bit j % 8 of byte j // 8, so
                  int4 has even channels in the low nibble. 8-bit codes: int8, uint8 (asymmetric) or E4M3, (N, K).
                  Bit planes: uint8 (k, N, ceil(K / 8)), plane i belongs to the coefficient c_(i + 1).
    weight_scale  float32 scales as int32 (N, K / group), (1, 1) for a whole tensor, (N / 128, K / 128) for blocks;
                  E8M0 bytes as uint8; E4M3; coefficients of planes as bfloat16 (N, K / group, k + 1)
    weight_zero   zero points as uint8, in the shape of the scales; as int32 views of float32 if one of them is not a
                  whole number from 0 to 255
    weight_whole  the float32 scale of the tensor as int32 (), for formats with E4M3 scales
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.kernels.fp8 import E4M3
from postgen.quant.formats import SQUARE, Format
from postgen.quant.grids import FloatGrid
from postgen.quant.rounding import Quantized, Scales, grouped, ungrouped

MANTISSA_BITS = 23
"""An E8M0 byte e means 2^(e - 127), so it is the exponent field of the float32 number, above this many bits."""


def pack(quantized: Quantized) -> dict[str, Tensor]:
    """Pack a quantised weight (N, K) into the tensors that the module docstring describes.

    `unpack` returns the same weight, except for coefficients of bit planes, which are rounded to bfloat16.

    Raises:
        UserError: the quantised tensor is not a matrix.
    """
    format, scales = quantized.format, quantized.scales
    if len(quantized.shape) != 2:
        raise UserError(f"only a matrix (N, K) can be packed, got a tensor of shape {tuple(quantized.shape)}")
    values = ungrouped(quantized.values, format, quantized.shape)
    packed = {"weight": _pack_codes(values, format)}
    if format.planes:
        return packed | {"weight_scale": scales.scale.bfloat16().contiguous()}
    scale = scales.scale.squeeze(-1).float().contiguous()
    if format.scale == "e8m0":
        packed["weight_scale"] = (scale.view(torch.int32) >> MANTISSA_BITS).to(torch.uint8)
    elif format.scale == "e4m3":
        packed["weight_scale"] = scale.to(E4M3)
    else:
        packed["weight_scale"] = scale.view(torch.int32)
    if scales.zero is not None:
        packed["weight_zero"] = _pack_zero(scales.zero.squeeze(-1).float().contiguous())
    if scales.whole is not None:
        packed["weight_whole"] = scales.whole.float().reshape(()).view(torch.int32)
    return packed


def unpack(tensors: Mapping[str, Tensor], format: Format, shape: tuple[int, ...]) -> Quantized:
    """Return the quantised weight whose packed tensors are given (the inverse of `pack`).

    Args:
        tensors: the tensors of `pack`, on any device. E4M3 and bfloat16 tensors may be views as bytes.
        format: the number format.
        shape: shape (N, K) of the weight.

    Raises:
        UserError: a tensor is missing, or its shape or dtype does not fit the format.
    """
    check(tensors, format, shape)
    values = grouped(unpack_codes(tensors["weight"], format, shape), format)
    return Quantized(values=values, scales=unpack_scales(tensors, format), format=format, shape=tuple(shape))


def unpack_scales(tensors: Mapping[str, Tensor], format: Format) -> Scales:
    """Return the scales of packed tensors, float32; `unpack` describes the arguments."""
    stored = tensors["weight_scale"]
    if format.planes:
        return Scales(scale=stored.view(torch.bfloat16).float())
    if format.scale == "e8m0":
        return Scales(scale=(stored.int() << MANTISSA_BITS).view(torch.float32)[..., None])
    if format.scale == "e4m3":
        whole = tensors["weight_whole"].view(torch.float32)
        return Scales(scale=stored.view(E4M3).float()[..., None], whole=whole)
    zero = tensors.get("weight_zero")
    if zero is not None:
        zero = (zero.view(torch.float32) if zero.dtype == torch.int32 else zero.float())[..., None]
    return Scales(scale=stored.view(torch.float32)[..., None], zero=zero)


def unpack_codes(stored: Tensor, format: Format, shape: tuple[int, ...]) -> Tensor:
    """Return the numbers of the grid of a packed weight, float32 (N, K); `pack` describes its tensor `weight`."""
    if format.planes:
        patterns = from_bits(stored[0], 1, shape[-1])
        for plane in range(1, format.planes):
            patterns |= from_bits(stored[plane], 1, shape[-1]) << plane
        return patterns.float()
    if format.grid.bits < 8:
        return format.grid.decode(from_bits(stored, format.grid.bits, shape[-1]))
    return stored.view(_native(format)).float()


def layout(format: Format, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shapes and dtypes of the packed tensors of a weight.

    Args:
        format: the number format.
        shape: shape (N, K) of the weight.

    Raises:
        UserError: the format's group does not divide K.
    """
    rows, channels = shape
    groups = channels // format.group(channels)
    if format.planes:
        return {
            "weight": ((format.planes, rows, math.ceil(channels / 8)), torch.uint8),
            "weight_scale": ((rows, groups, format.planes + 1), torch.bfloat16),
        }
    bits = format.grid.bits
    places: tuple[int, ...]
    places = {"tensor": (1, 1), "block": (math.ceil(rows / SQUARE), groups)}.get(str(format.share), (rows, groups))
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight": ((rows, math.ceil(channels * bits / 8)), torch.uint8 if bits < 8 else _native(format)),
        "weight_scale": (places, {"e8m0": torch.uint8, "e4m3": E4M3}.get(format.scale, torch.int32)),
    }
    if format.asymmetric:
        found["weight_zero"] = (places, torch.uint8)
    if format.scale == "e4m3":
        found["weight_whole"] = ((), torch.int32)
    return found


def check(tensors: Mapping[str, Tensor], format: Format, shape: tuple[int, ...]) -> None:
    """Check that packed tensors belong to a weight of this format and shape.

    Raises:
        UserError: a tensor is missing, or its shape or dtype does not fit.
    """
    for name, (wanted, dtype) in layout(format, shape).items():
        found = tensors.get(name)
        if found is None:
            raise UserError(f"the packed {format.text} weight {tuple(shape)} has no tensor {name}: it is incomplete")
        if found.dtype != dtype:
            wanted = bits_shape(wanted, dtype)
        if tuple(found.shape) != wanted:
            raise UserError(
                f"{name} of a packed {format.text} weight {tuple(shape)} must have the shape {wanted}, got"
                f" {tuple(found.shape)}: the file is truncated or belongs to another model"
            )
        # Zero points that do not fit into bytes are views of float32.
        allowed = {dtype, bits_dtype(dtype)} | ({torch.int32} if name == "weight_zero" else set())
        if found.dtype not in allowed:
            raise UserError(f"{name} of a packed {format.text} weight must be {dtype}, got {found.dtype}")


def bits_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the integer dtype as which a packed tensor can be viewed, so that no library casts it."""
    # Not int16, which NCCL cannot send to other processes.
    return {E4M3: torch.uint8, torch.bfloat16: torch.uint8}.get(dtype, dtype)


def bits_shape(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """Return the shape of a packed tensor of this shape and dtype, viewed as `bits_dtype`."""
    return (*shape[:-1], 2 * shape[-1]) if dtype == torch.bfloat16 else shape


def to_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes into a little-endian bit stream along the last axis.

    Args:
        codes: uint8 (..., K), numbers below 2^bits.
        bits: bits of a code, 1 to 8.

    Returns:
        uint8 (..., ceil(K * bits / 8)).
    """
    codes_each, bytes_each, dtype = _word(bits)
    length = codes.shape[-1]
    codes = torch.nn.functional.pad(codes, (0, -length % codes_each)).unflatten(-1, (-1, codes_each))
    word = torch.zeros(codes.shape[:-1], dtype=dtype, device=codes.device)
    for place in range(codes_each):
        word |= codes[..., place].to(dtype) << (bits * place)
    stream = torch.stack([((word >> (8 * place)) & 255).to(torch.uint8) for place in range(bytes_each)], -1)
    return stream.flatten(-2)[..., : math.ceil(length * bits / 8)].contiguous()


def from_bits(stream: Tensor, bits: int, length: int) -> Tensor:
    """Return the codes of a bit stream, uint8 (..., length); the inverse of `to_bits`."""
    codes_each, bytes_each, dtype = _word(bits)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % bytes_each)).unflatten(-1, (-1, bytes_each))
    word = stream[..., 0].to(dtype)
    for place in range(1, bytes_each):
        word = word | (stream[..., place].to(dtype) << (8 * place))
    mask = 2**bits - 1
    codes = torch.stack([((word >> (bits * place)) & mask).to(torch.uint8) for place in range(codes_each)], -1)
    return codes.flatten(-2)[..., :length]


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """Return the smallest number of codes that fill whole bytes, the number of these bytes, and a dtype for both."""
    common = math.gcd(bits, 8)
    codes, size = 8 // common, bits // common
    return codes, size, torch.uint8 if size == 1 else torch.int32 if size < 4 else torch.int64


def _native(format: Format) -> torch.dtype:
    """Return the dtype of 8-bit codes."""
    return E4M3 if isinstance(format.grid, FloatGrid) else torch.uint8 if format.asymmetric else torch.int8


def _pack_codes(values: Tensor, format: Format) -> Tensor:
    if format.planes:
        patterns = values.to(torch.uint8)
        return torch.stack([to_bits((patterns >> plane) & 1, 1) for plane in range(format.planes)])
    if format.grid.bits < 8:
        return to_bits(format.grid.encode(values), format.grid.bits)
    return values.to(_native(format)).contiguous()


def _pack_zero(zero: Tensor) -> Tensor:
    small = zero.to(torch.uint8)
    return small if torch.equal(small.float(), zero) else zero.view(torch.int32)
