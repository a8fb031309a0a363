"""Expansion of packed weights: the numbers of every format, 8-bit results, refused arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.kernels.fp8 import E4M3, from_fp8
from postgen.kernels.int8 import from_int8
from postgen.kernels.weight_expand import naive
from postgen.kernels.weight_expand.ops import expand, expand_planes, row_scale_of
from postgen.quant import Quantized, format_of, quantize_tensor
from tests.kernels.launches import assert_compiles_whole, relative_error
from tests.kernels.weight_expand_cases import CASES, Case, planes_of

WEIGHT = torch.randn(9, 192, generator=torch.Generator().manual_seed(0))


def bits_of(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into a little-endian bit stream, one bit at a time."""
    places = torch.arange(bits)
    flat = ((codes.int()[..., None] >> places) & 1).flatten(-2)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (flat << torch.arange(8)).sum(-1).to(torch.uint8)


def expanded(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pack a quantised weight of rows or groups, and expand it."""
    format, scales = quantized.format, quantized.scales
    rows, channels = quantized.shape
    values = quantized.values.view(rows, channels)
    if format.planes:
        streams = torch.stack([bits_of((values.int() >> plane) & 1, 1) for plane in range(format.planes)])
        out: Tensor = expand_planes(streams, scales.scale, None, channels, dtype)
        return out
    bits = format.grid.bits
    patterns = torch.arange(2**bits, dtype=torch.uint8)
    signed = format.name.startswith("int")
    table = None if signed else format.grid.decode(patterns)
    zero = None if scales.zero is None else scales.zero.squeeze(-1)
    codes = bits_of(format.grid.encode(values), bits)
    return expand(  # type: ignore[no-any-return]
        codes, scales.step.squeeze(-1), zero, table, None, bits, channels, signed and not format.asymmetric, dtype
    )


@pytest.mark.parametrize(
    "text",
    [
        *("int2:g64", "int3:g32:asym", "int4:g64", "int4:g64:asym", "int5", "int6:g96", "int7", "int8:tensor"),
        *("mxfp4", "mxfp6", "mxint4", "nvfp4", "nvint4", "bp2", "bp3:g32", "bp4"),
    ],
)
def test_the_numbers_of_a_format(text: str) -> None:
    quantized = quantize_tensor(WEIGHT, format_of(text))
    found = expanded(quantized)
    if quantized.format.planes:
        torch.testing.assert_close(found, quantized.numbers())
    else:
        assert torch.equal(found, quantized.numbers())
    assert torch.equal(expanded(quantized, torch.bfloat16), found.bfloat16())


@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
def test_four_bits_in_eight(dtype: torch.dtype) -> None:
    """The second rounding costs far less than the first one."""
    quantized = quantize_tensor(WEIGHT, format_of("int4:g64"))
    codes = bits_of(quantized.format.grid.encode(quantized.values.view(9, 192)), 4)
    scale, row_scale = quantized.scales.scale.squeeze(-1), row_scale_of(quantized.numbers(), dtype)
    found = expand(codes, scale, None, None, row_scale, 4, 192, True, dtype)
    back = from_fp8(found, row_scale) if dtype == E4M3 else from_int8(found, row_scale)
    assert found.dtype == dtype
    first = relative_error(quantized.numbers(), WEIGHT)
    assert relative_error(back, quantized.numbers()) < first / 3
    assert relative_error(back, WEIGHT) < 1.06 * first


def test_codes_in_e4m3_need_no_table() -> None:
    codes = WEIGHT.clamp(-2, 2).to(E4M3)
    scale = torch.rand(9, 6) + 0.5
    found = expand(codes, scale, None, None, None, 8, 192, False, torch.float32)
    assert torch.equal(found, codes.float() * scale.repeat_interleave(32, 1))


def test_blocks_of_rows_share_a_scale() -> None:
    quantized = quantize_tensor(torch.randn(200, 256), format_of("fp8:block"))
    scale = quantized.scales.scale.squeeze(-1)
    numbers = quantized.numbers()
    wide = naive.per_channel(scale, 200, 256)
    assert torch.equal(
        expand((numbers / wide).to(E4M3), scale, None, None, None, 8, 256, False, torch.float32), numbers
    )


def test_operations_are_registered_rightly() -> None:
    checks: dict[str, Any] = {
        "test_utils": ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    }
    case = CASES[1]
    torch.library.opcheck(expand, case.arguments(torch.bfloat16), **checks)
    torch.library.opcheck(expand, case.arguments(E4M3, torch.ones(case.rows, 1)), **checks)
    torch.library.opcheck(
        expand_planes, (*planes_of(2, 3, 64, 32, torch.bfloat16), None, 64, torch.bfloat16), **checks
    )


@pytest.mark.slow
def test_compiled() -> None:
    arguments = CASES[1].arguments(torch.bfloat16)
    assert_compiles_whole(lambda codes: expand(codes, *arguments[1:]), arguments[0])


GOOD = Case(4, 64, 32, 4).arguments(torch.float32)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, GOOD[0][:, :-1], r"codes must be \(N, 32\) bytes for 64 channels of 4 bits"),
        (1, GOOD[1].bfloat16(), "scale must have 4 rows .* got torch.bfloat16"),
        (1, torch.ones(4, 5), "a divisor of 64 groups"),
        (2, torch.ones(4, 1), r"zero must be float32 or uint8 of shape \(4, 2\)"),
        (3, torch.ones(8), r"table must be float32 of shape \(16,\)"),
        (4, torch.ones(4, 1), "row_scale is for results in"),
        (5, 9, "bits must be 1 to 8, got 9"),
        (8, E4M3, "row_scale is for results in"),
        (8, torch.int32, "dtype must be a floating-point dtype"),
        (1, GOOD[1].to("meta"), "all tensors on one device"),
    ],
)
def test_what_does_not_fit_is_refused(place: int, value: Any, message: str) -> None:
    arguments = [*GOOD]
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        expand(*arguments)


def test_planes_that_do_not_fit_are_refused() -> None:
    streams, coefficients = planes_of(2, 3, 64, 32, torch.bfloat16)
    with pytest.raises(ValueError, match=r"planes must be uint8 \(k, N, 8\) for 64 channels"):
        expand_planes(streams[..., :7], coefficients, None, 64, torch.float32)
    with pytest.raises(ValueError, match=r"coefficients must be \(N, K / g, 3\) for 2 planes"):
        expand_planes(streams, coefficients[..., :2], None, 64, torch.float32)
    with pytest.raises(ValueError, match=r"row_scale must be float32 \(3, 1\)"):
        expand_planes(streams, coefficients, torch.ones(3), 64, E4M3)
