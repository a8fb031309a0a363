"""Rows and products in int8: rounding, errors, non-finite inputs, gradients, shapes, refused arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.kernels.int8 import from_int8, int8_scale, to_int8
from postgen.kernels.int8_rows import naive
from postgen.kernels.int8_rows.ops import quantize_rows, rows_linear, rows_matmul
from tests.kernels.launches import assert_compiles_whole, relative_error


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = rows_matmul(*quantize_rows(x), *quantize_rows(weight), bias, x.dtype)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(64,), (2, 3, 17), (2, 0, 16)])
def test_rows_are_rounded_as_everywhere(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = gaussian(*shape, dtype=dtype)
    codes, scale = quantize_rows(x)
    assert (codes.dtype, codes.shape, scale.shape) == (torch.int8, x.shape, (*shape[:-1], 1))
    assert torch.equal(scale, int8_scale(x, -1))
    assert torch.equal(codes, to_int8(x, scale))
    assert ((from_int8(codes, scale) - x.float()).abs() <= scale * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_a_product(dtype: torch.dtype) -> None:
    x, weight, bias = (each.to(dtype) for each in (gaussian(64, 1500), gaussian(256, 1500, seed=1), gaussian(256)))
    # 127 steps up to the largest of 1,500 normal numbers, about 3.3 deviations: each factor contributes .0075.
    assert 0.009 < relative_error(product(x, weight), x.double() @ weight.double().mT) < 0.012
    rounded = from_int8(*quantize_rows(x)).double() @ from_int8(*quantize_rows(weight)).double().mT + bias.double()
    assert relative_error(product(x, weight, bias), rounded) < (1e-6 if dtype == torch.float32 else 3e-3)


def test_sums_are_exact() -> None:
    codes = torch.full((1, 3001), 127, dtype=torch.int8)
    ones = torch.ones(1, 1)
    assert rows_matmul(codes, ones, codes, ones, None, torch.float64).item() == float(torch.tensor(3001.0 * 127**2))


def test_a_token_touches_no_other() -> None:
    x, weight = gaussian(2, 8, 64), gaussian(32, 64, seed=1)
    plain = product(x, weight)
    for value in (torch.inf, torch.nan):
        odd = x.clone()
        odd[1, 3, 5] = value
        found = product(odd, weight)
        others = torch.ones(2, 8, dtype=torch.bool)
        others[1, 3] = False
        assert torch.equal(found[others], plain[others])
        assert not found[1, 3].isfinite().any()
    assert torch.equal(product(torch.zeros(3, 64), weight), torch.zeros(3, 32))


def test_gradients_pass_the_rounding_by() -> None:
    x, weight, bias = gaussian(2, 3, 32), gaussian(16, 32, seed=1), gaussian(16, seed=2)
    leaves = [each.requires_grad_() for each in (x, weight, bias)]
    rounded, weight_scale = quantize_rows(weight.detach())
    out = rows_linear(x, *quantize_rows(x.detach()), rounded, weight_scale, bias, weight)
    gradient = gaussian(2, 3, 16, seed=3)
    found = torch.autograd.grad(out, leaves, gradient)
    expected = (
        gradient @ from_int8(rounded, weight_scale),
        gradient.flatten(0, 1).mT @ x.detach().flatten(0, 1),
        gradient.sum((0, 1)),
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_operations_are_registered_rightly() -> None:
    codes, scale = quantize_rows(gaussian(3, 32))
    weight, weight_scale = quantize_rows(gaussian(16, 32))
    torch.library.opcheck(quantize_rows, (gaussian(3, 32),))
    torch.library.opcheck(rows_matmul, (codes, scale, weight, weight_scale, gaussian(16), torch.bfloat16))
    x, bias, original = (gaussian(*shape).requires_grad_() for shape in ((3, 32), (16,), (16, 32)))
    torch.library.opcheck(rows_linear, (x, codes, scale, weight, weight_scale, bias, original))


@pytest.mark.slow
def test_compiled() -> None:
    weight, weight_scale = quantize_rows(gaussian(16, 32))
    assert_compiles_whole(
        lambda x: rows_matmul(*quantize_rows(x), weight, weight_scale, None, x.dtype), gaussian(3, 32)
    )


CODES, SCALE = naive.quantize_rows(torch.ones(3, 32))
GOOD = {"codes": CODES, "scale": SCALE, "weight": CODES, "weight_scale": SCALE, "bias": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.ones(3, 32)}, "must be torch.int8, got torch.float32"),
        ({"codes": CODES[:, :16]}, r"with the same K, got \(3, 16\) and \(3, 32\)"),
        ({"scale": SCALE[:2]}, r"scale must be float32 of shape \(3, 1\)"),
        ({"bias": torch.ones(4)}, r"bias must be \(3,\), got \(4,\)"),
        ({"scale": SCALE.to("meta")}, "int8_rows_matmul needs all tensors on one device"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows_matmul(**{**GOOD, **change}, dtype=torch.float32)
    with pytest.raises(ValueError, match="x must be"):
        quantize_rows(torch.ones(3, 4, dtype=torch.int32))
