"""Rows and products in int8 in Triton's interpreter: equal to the reference bit by bit.

`test_interpreted.py` runs this file.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postgen.kernels.int8_rows import naive, triton
from tests.kernels.poison import poisoned_memory


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 48), (2, 1000)])
def test_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = draw(*shape).to(dtype)
    x[..., 0, :] *= 100
    check(x)
    check(draw(48, 6).mT)


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, -125.5]])
    codes, _ = triton.quantize_rows(x)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -126, -126]]


def test_zeros_and_what_is_not_finite() -> None:
    x = draw(6, 32)
    x[1] = 0
    x[2, 3], x[3, 4], x[4, 5] = torch.nan, torch.inf, -torch.inf
    x[5] = 1e-38
    check(x)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "k", "n"), [(3, 16, 16), (40, 144, 130), (130, 128, 24)])
def test_products(rows: int, k: int, n: int, with_bias: bool) -> None:
    parts = (*naive.quantize_rows(draw(rows, k)), *naive.quantize_rows(draw(n, k, seed=1)))
    bias = draw(n, seed=2) if with_bias else None
    with poisoned_memory():
        found = triton.rows_matmul(*parts, bias, torch.float32)
    assert torch.equal(found, naive.rows_matmul(*parts, bias, torch.float32))


def test_the_largest_sums() -> None:
    codes, scale = torch.full((2, 3000), 127, dtype=torch.int8), torch.ones(2, 1)
    found = triton.rows_matmul(codes, scale, codes, scale, None, torch.float32)
    assert (found == 3000 * 127**2).all()


def check(x: Tensor) -> None:
    with poisoned_memory():
        codes, scale = triton.quantize_rows(x)
    expected, expected_scale = naive.quantize_rows(x)
    assert torch.equal(scale.nan_to_num(-1, -2), expected_scale.nan_to_num(-1, -2))
    assert (codes.dtype, codes.shape, codes.is_contiguous()) == (torch.int8, x.shape, True)
    assert torch.equal(codes, expected)
