"""Quantised rows on a GPU: the codes and the scaled product against the reference, CUDA graphs, odd rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.kernels.fp8_rows import naive
from postgen.kernels.fp8_rows.ops import MAX_CHANNELS, quantize_rows, rows_linear, rows_matmul, why_not_fp8
from tests.kernels.launches import assert_compiles_whole, assert_records, assert_repeats, relative_error
from tests.kernels.poison import poisoned_memory

HAS = torch.cuda.is_available() and why_not_fp8(torch.device("cuda", 0)) is None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS, reason="needs a GPU with FP8")]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", dtype=dtype)


def assert_same(x: Tensor) -> None:
    with poisoned_memory():
        codes, scale = quantize_rows(x)
    expected, expected_scale = naive.quantize_rows(x)
    assert torch.equal(scale.nan_to_num(-1, -2), expected_scale.nan_to_num(-1, -2))
    assert torch.equal(codes.float().nan_to_num(1000), expected.float().nan_to_num(1000))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 16), (2, 77, 1536), (1, 513, 5120), (129, 13824), (5, 1000), (3, MAX_CHANNELS)])
def test_the_codes_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype)
    x[..., 0, :] *= 1000
    assert_same(x)


def test_gaps_between_rows_and_what_is_not_finite() -> None:
    wide = draw(64, 4096)
    assert_same(wide[:, 1024:2560])
    assert_same(wide[:, ::2])
    x = draw(6, 512)
    x[1] = 0
    x[2, 3], x[3, 4], x[4, 5] = torch.nan, torch.inf, -torch.inf
    x[5] = 1e-38
    assert_same(x)


def test_more_numbers_than_32_bits_count() -> None:
    x = torch.zeros(2**31 // 4096 + 3, 4096, device="cuda", dtype=torch.bfloat16)
    x[-1] = 3
    codes, scale = quantize_rows(x)
    assert scale[-1].item() == pytest.approx(3 / 448)
    assert (codes[-1].float() == 448).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 16, 16), (77, 1536, 1536), (300, 13824, 5120), (257, 5120, 13824)])
def test_the_product(rows: int, k: int, n: int, with_bias: bool, dtype: torch.dtype) -> None:
    x, weight = draw(rows, k, dtype=dtype), draw(n, k, dtype=dtype, seed=1) / k**0.5
    bias = draw(n, dtype=dtype, seed=2) if with_bias else None
    parts: tuple[Any, ...] = (*quantize_rows(x), *quantize_rows(weight), bias, dtype)
    with poisoned_memory():
        found = rows_matmul(*parts)
    assert (found.dtype, found.shape) == (dtype, (rows, n))
    # The accumulation and the rounding to bfloat16 cause a relative error of .0023 to .0033.
    assert relative_error(found, naive.rows_matmul(*parts[:-1], torch.float32)) < 0.006


def test_long_sums_that_do_not_cancel() -> None:
    """The rows equal those of the weights; with fast accumulation the diagonal of the product loses 16 %."""
    x = draw(16, 13824, dtype=torch.float32)
    parts: tuple[Any, ...] = (*quantize_rows(x), *quantize_rows(x), None, torch.float32)
    assert relative_error(rows_matmul(*parts), naive.rows_matmul(*parts)) < 0.006


def test_channels_that_16_does_not_divide_are_plain_torch() -> None:
    parts: tuple[Any, ...] = (*quantize_rows(draw(4, 40)), *quantize_rows(draw(24, 40)), None, torch.float32)
    assert relative_error(rows_matmul(*parts), naive.rows_matmul(*parts)) < 1e-3


def test_no_tokens() -> None:
    parts: tuple[Any, ...] = (*quantize_rows(draw(2, 0, 64)), *quantize_rows(draw(32, 64)), draw(32), torch.bfloat16)
    assert rows_matmul(*parts).shape == (2, 0, 32)


def test_gradients() -> None:
    x, weight = draw(33, 256).requires_grad_(), draw(64, 256)
    codes, scale = quantize_rows(x.detach())
    rounded, weight_scale = quantize_rows(weight)
    out = rows_linear(x, codes, scale, rounded, weight_scale, None, None)
    (found,) = torch.autograd.grad(out, x, torch.ones_like(out))
    expected = torch.ones_like(out).float() @ naive.weight_of(rounded, weight_scale, torch.float32)
    assert relative_error(found, expected) < 0.01


def test_repeats_records_and_compiles() -> None:
    x = draw(128, 1536)
    weight, weight_scale = quantize_rows(draw(512, 1536))

    def call(x: Tensor) -> Tensor:
        out: Tensor = rows_matmul(*quantize_rows(x), weight, weight_scale, None, x.dtype)
        return out

    assert_repeats(lambda: call(x))
    assert_records(lambda: call(x))
    assert_compiles_whole(call, x)
