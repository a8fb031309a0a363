"""The kernels of quantised layers on a GPU against their references: int8, blocks in E4M3, rotation, expansion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.kernels.fp8 import E4M3
from postgen.kernels.fp8_blocks import naive as blocks
from postgen.kernels.fp8_blocks.ops import blocks_matmul, quantize_parts, why_not_blocks
from postgen.kernels.fp8_rows.ops import why_not_fp8
from postgen.kernels.hadamard_rows import naive as hadamard
from postgen.kernels.hadamard_rows.ops import rotate_quantize
from postgen.kernels.int8_rows import naive as int8
from postgen.kernels.int8_rows.ops import quantize_rows, rows_matmul
from postgen.kernels.weight_expand import naive as weights
from postgen.kernels.weight_expand.ops import expand, expand_planes, row_scale_of
from tests.kernels.launches import assert_compiles_whole, assert_records, assert_repeats, relative_error
from tests.kernels.poison import poisoned_memory
from tests.kernels.weight_expand_cases import CASES, Case, planes_of

CUDA = torch.device("cuda", 0)
HAS_FP8 = torch.cuda.is_available() and why_not_fp8(CUDA) is None
HAS_BLOCKS = HAS_FP8 and why_not_blocks(CUDA) is None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="needs a GPU with FP8")
needs_blocks = pytest.mark.skipif(not HAS_BLOCKS, reason="needs Hopper")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", dtype=dtype)


def equal(found: Tensor, expected: Tensor) -> bool:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return torch.equal(found.float().nan_to_num(1000, -1, -2), expected.float().nan_to_num(1000, -1, -2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 16), (2, 77, 1536), (129, 13824), (5, 1000)])
def test_int8_codes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype)
    x[..., 0, :] *= 1000
    x[..., 1, 3] = torch.nan
    with poisoned_memory():
        found = quantize_rows(x)
    assert all(equal(*pair) for pair in zip(found, int8.quantize_rows(x), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 16, 16), (77, 1536, 1536), (300, 13824, 5120), (257, 1000, 999)])
def test_int8_products(rows: int, k: int, n: int, with_bias: bool, dtype: torch.dtype) -> None:
    parts = (*quantize_rows(draw(rows, k)), *quantize_rows(draw(n, k, seed=1)))
    bias = draw(n, dtype=dtype, seed=2) if with_bias else None
    with poisoned_memory():
        found = rows_matmul(*parts, bias, dtype)
    expected = int8.rows_matmul(*parts, bias, torch.float32)
    assert found.dtype == dtype
    # The sums are exact; only the last rounding and the order of two float32 products remain.
    limit = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-6}[dtype]
    assert relative_error(found, expected) < limit


@needs_fp8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 128), (2, 77, 1536), (129, 13824)])
def test_parts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype)
    x[..., 0, :] *= 1000
    with poisoned_memory():
        found = quantize_parts(x)
    assert all(equal(*pair) for pair in zip(found, blocks.quantize_parts(x), strict=True))


@needs_blocks
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "k", "n"), [(4, 128, 128), (77, 1536, 1536), (300, 8960, 1536), (257, 5120, 13824)])
def test_block_products(rows: int, k: int, n: int, with_bias: bool, dtype: torch.dtype) -> None:
    """8960 channels are 70 blocks, which is no multiple of four; 77 and 257 tokens are no multiples of four either."""
    x, weight = draw(rows, k), draw(n, k, seed=1)
    x[:, : k // 2] *= 100
    parts: tuple[Any, ...] = (*quantize_parts(x), *blocks.quantize_blocks(weight))
    bias = draw(n, dtype=dtype, seed=2) if with_bias else None
    with poisoned_memory():
        found = blocks_matmul(*parts, bias, dtype)
    assert (found.dtype, found.shape) == (dtype, (rows, n))
    assert relative_error(found, blocks.blocks_matmul(*parts, bias, torch.float32)) < 0.006


@pytest.mark.parametrize("to", [pytest.param(E4M3, marks=needs_fp8), torch.int8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "channels", "block"),
    [(5, 16, 2), (77, 1536, 128), (130, 5120, 128), (33, 13824, 64), (20, 13824, 512), (9, 8192, 4096), (3, 1000, 8)],
)
def test_rotated_rows(rows: int, channels: int, block: int, dtype: torch.dtype, to: torch.dtype) -> None:
    x = draw(rows, channels, dtype=dtype)
    x[:, 5] *= 40
    signs = draw(channels, seed=1).sign()
    for given in (None, signs):
        with poisoned_memory():
            codes, scale = rotate_quantize(x, block, given, to)
        expected, expected_scale = hadamard.rotate_quantize(x, block, given, to)
        torch.testing.assert_close(scale, expected_scale, rtol=2e-5, atol=0)
        # The order of the sums differs, so numbers near the middle of two codes may get the other code.
        different = codes.float() != expected.float()
        assert different.float().mean() < 2e-3
        steps = (codes.float() - expected.float()).abs()
        assert (steps <= (expected.float().abs() / 7).clamp_min(1.01)).all()


def test_whole_numbers_are_rotated_exactly() -> None:
    x = torch.randint(-8, 9, (40, 4096), device="cuda").bfloat16()
    for block in (16, 128, 1024):
        codes, scale = rotate_quantize(x, block, None, torch.int8)
        expected, expected_scale = hadamard.rotate_quantize(x, block, None, torch.int8)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("case", [*CASES, Case(1536, 8960, 64, 4), Case(300, 5120, 128, 3)], ids=str)
def test_expansion(case: Case) -> None:
    for dtype in (*DTYPES, torch.int8, *([E4M3] if HAS_FP8 else [])):
        row_scale = None
        if dtype in (E4M3, torch.int8):
            row_scale = row_scale_of(weights.expand(*case.arguments(torch.float32, device="cuda")), dtype)
        arguments = case.arguments(dtype, row_scale, "cuda")
        with poisoned_memory():
            found = expand(*arguments)
        assert equal(found, weights.expand(*arguments))


@pytest.mark.parametrize(
    ("planes", "rows", "channels", "group"), [(2, 1536, 5120, 64), (3, 7, 192, 32), (4, 3, 60, 20)]
)
def test_expansion_of_planes(planes: int, rows: int, channels: int, group: int) -> None:
    streams, coefficients = (x.cuda() for x in planes_of(planes, rows, channels, group, torch.bfloat16))
    with poisoned_memory():
        found = expand_planes(streams, coefficients, None, channels, torch.float32)
    assert torch.equal(found, weights.expand_planes(streams, coefficients, None, channels, torch.float32))


@needs_fp8
def test_repeats_records_and_compiles() -> None:
    x, weight = draw(128, 1536), draw(512, 1536, seed=1)
    of_int8, of_blocks = quantize_rows(weight), blocks.quantize_blocks(weight)
    packed = Case(512, 1536, 64, 4).arguments(torch.bfloat16, device="cuda")

    def call(x: Tensor) -> tuple[Tensor, ...]:
        first = rows_matmul(*quantize_rows(x), *of_int8, None, x.dtype)
        turned, scale = rotate_quantize(x, 128, None, torch.int8)
        second = rows_matmul(turned, scale, *of_int8, None, x.dtype)
        third = torch.nn.functional.linear(x, expand(*packed))
        parts = quantize_parts(x)
        fourth = blocks_matmul(*parts, *of_blocks, None, x.dtype) if HAS_BLOCKS else parts[0].float()
        return first, second, third, fourth

    assert_repeats(lambda: call(x))
    assert_records(lambda: call(x))
    assert_compiles_whole(call, x)
