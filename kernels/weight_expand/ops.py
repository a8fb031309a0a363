"""Expansion of packed weights as torch custom operations: to bfloat16, or to E4M3 or int8 with a scale per row.

With many tokens a linear layer is limited by its product, so a packed weight saves memory and no time: it is expanded
once per product, which costs a few per cent of it, and multiplied by cuBLAS. On a GPU a Triton kernel expands,
elsewhere plain torch. The operations have no gradient. Shapes as in `naive.py`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, library

from postgen.kernels.dispatch import check_devices, uses_triton
from postgen.kernels.fp8 import E4M3, fp8_scale
from postgen.kernels.fp8_rows.ops import why_not_fp8
from postgen.kernels.int8 import int8_scale
from postgen.kernels.weight_expand import naive
from postgen.kernels.weight_expand.naive import BLOCK_ROWS

BYTES = (torch.uint8, torch.int8, E4M3)
"""The dtypes of codes; each is read as bytes."""


@library.custom_op("postgen::weight_expand", mutates_args=())
def expand(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    row_scale: Tensor | None,
    bits: int,
    channels: int,
    signed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return the numbers that packed codes represent.

    Args:
        codes: (N, ceil(K * bits / 8)), bytes of a little-endian bit stream, one of the dtypes `BYTES`.
        scale: (N, K / g), (1, 1), or (ceil(N / 128), K / g), float32.
        zero: zero points in the shape of `scale`, float32 or uint8, or None.
        table: (2^bits,), float32: the number of each code, for codes that are not whole numbers; None for whole ones
            and for codes in E4M3.
        row_scale: (N, 1), float32: the scales of the result if it is E4M3 or int8, see `row_scale_of`; else None.
        bits: bits of a code, 1 to 8.
        channels: K.
        signed: whether the codes are in two's complement; without a table only.
        dtype: the dtype of the result: a floating-point dtype without `row_scale`, E4M3 or int8 with it.

    Returns:
        (N, K).

    Raises:
        ValueError: the shapes, dtypes or devices do not match.
    """
    _check(codes, scale, zero, table, row_scale, bits, channels, dtype)
    if codes.dtype == E4M3 and table is None:
        table = _e4m3(codes.device)
    if codes.numel() and _possible(codes, dtype) and uses_triton("weight_expand", scale):
        from postgen.kernels.weight_expand import triton

        return triton.expand(codes, scale, zero, table, row_scale, bits, channels, signed, dtype)
    return naive.expand(codes, scale, zero, table, row_scale, bits, channels, signed, dtype)


@library.custom_op("postgen::weight_expand_planes", mutates_args=())
def expand_planes(
    planes: Tensor, coefficients: Tensor, row_scale: Tensor | None, channels: int, dtype: torch.dtype
) -> Tensor:
    """Return the numbers that bit planes represent.

    Args:
        planes: (k, N, ceil(K / 8)), uint8, a bit stream for each plane.
        coefficients: (N, K / g, k + 1), bfloat16 or float32, the constant first.
        row_scale: as for `expand`.
        channels: K.
        dtype: as for `expand`.

    Returns:
        (N, K).

    Raises:
        ValueError: the shapes, dtypes or devices do not match.
    """
    _check_planes(planes, coefficients, row_scale, channels, dtype)
    if planes.numel() and _possible(planes, dtype) and uses_triton("weight_expand_planes", coefficients):
        from postgen.kernels.weight_expand import triton

        return triton.expand_planes(planes, coefficients, row_scale, channels, dtype)
    return naive.expand_planes(planes, coefficients, row_scale, channels, dtype)


def row_scale_of(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scales (N, 1) with which rows of a weight (N, K) fill the range of E4M3 or int8, float32."""
    return fp8_scale(numbers, -1) if dtype == E4M3 else int8_scale(numbers, -1)


@expand.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    row_scale: Tensor | None,
    bits: int,
    channels: int,
    signed: bool,
    dtype: torch.dtype,
) -> Tensor:
    _check(codes, scale, zero, table, row_scale, bits, channels, dtype)
    return torch.empty((codes.shape[0], channels), dtype=dtype, device=codes.device)


@expand_planes.register_fake
def _(planes: Tensor, coefficients: Tensor, row_scale: Tensor | None, channels: int, dtype: torch.dtype) -> Tensor:
    _check_planes(planes, coefficients, row_scale, channels, dtype)
    return torch.empty((planes.shape[1], channels), dtype=dtype, device=planes.device)


@functools.cache
def _e4m3(device: torch.device) -> Tensor:
    """Return the numbers of all E4M3 codes; the table is kept on the device, because a copy would wait."""
    return torch.arange(256, dtype=torch.uint8).view(E4M3).float().to(device)


def _possible(codes: Tensor, dtype: torch.dtype) -> bool:
    # Triton refuses to compile E4M3 for GPUs that do not have it.
    return dtype != E4M3 or why_not_fp8(codes.device) is None


def _check(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor | None,
    row_scale: Tensor | None,
    bits: int,
    channels: int,
    dtype: torch.dtype,
) -> None:
    check_devices("weight_expand", codes, scale, zero, table, row_scale)
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    if codes.dim() != 2 or codes.dtype not in BYTES or codes.shape[1] != -(-channels * bits // 8):
        raise ValueError(
            f"codes must be (N, {-(-channels * bits // 8)}) bytes for {channels} channels of {bits} bits, got"
            f" {codes.dtype} {tuple(codes.shape)}"
        )
    _check_groups("scale", scale, codes.shape[0], channels, (torch.float32,))
    if zero is not None and (zero.shape != scale.shape or zero.dtype not in (torch.float32, torch.uint8)):
        raise ValueError(
            f"zero must be float32 or uint8 of shape {tuple(scale.shape)}, got {zero.dtype} {tuple(zero.shape)}"
        )
    if table is not None and (table.shape != (2**bits,) or table.dtype != torch.float32):
        raise ValueError(f"table must be float32 of shape ({2**bits},), got {table.dtype} {tuple(table.shape)}")
    _check_result(row_scale, codes.shape[0], dtype)


def _check_planes(
    planes: Tensor, coefficients: Tensor, row_scale: Tensor | None, channels: int, dtype: torch.dtype
) -> None:
    check_devices("weight_expand_planes", planes, coefficients, row_scale)
    if planes.dim() != 3 or planes.dtype != torch.uint8 or planes.shape[2] != -(-channels // 8):
        raise ValueError(
            f"planes must be uint8 (k, N, {-(-channels // 8)}) for {channels} channels, got {planes.dtype}"
            f" {tuple(planes.shape)}"
        )
    if coefficients.dim() != 3 or coefficients.shape[2] != planes.shape[0] + 1:
        raise ValueError(
            f"coefficients must be (N, K / g, {planes.shape[0] + 1}) for {planes.shape[0]} planes, got"
            f" {tuple(coefficients.shape)}"
        )
    allowed = torch.bfloat16, torch.float32
    _check_groups("coefficients", coefficients, planes.shape[1], channels, allowed, rows_only=True)
    _check_result(row_scale, planes.shape[1], dtype)


def _check_groups(
    name: str, scale: Tensor, rows: int, channels: int, dtypes: tuple[torch.dtype, ...], *, rows_only: bool = False
) -> None:
    counts = (rows,) if rows_only else (rows, 1, -(-rows // BLOCK_ROWS))
    if scale.dtype not in dtypes or scale.dim() < 2 or scale.shape[0] not in counts or channels % scale.shape[1]:
        raise ValueError(
            f"{name} must have {rows} rows (or one, or one for {BLOCK_ROWS} rows) of a divisor of {channels} groups,"
            f" in {' or '.join(map(str, dtypes))}, got {scale.dtype} {tuple(scale.shape)}"
        )


def _check_result(row_scale: Tensor | None, rows: int, dtype: torch.dtype) -> None:
    if (row_scale is not None) != (dtype in (E4M3, torch.int8)):
        raise ValueError(f"row_scale is for results in {E4M3} or {torch.int8} and only for them, got {dtype}")
    if row_scale is None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype, {E4M3} or {torch.int8}, got {dtype}")
    if row_scale is not None and (row_scale.shape != (rows, 1) or row_scale.dtype != torch.float32):
        raise ValueError(f"row_scale must be float32 ({rows}, 1), got {row_scale.dtype} {tuple(row_scale.shape)}")
