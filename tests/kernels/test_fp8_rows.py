"""Quantised rows and their products: rounding, errors, non-finite inputs, gradients, shapes, refused arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.kernels.fp8 import E4M3, fp8_scale, from_fp8, to_fp8
from postgen.kernels.fp8_rows import naive
from postgen.kernels.fp8_rows.ops import quantize_rows, rows_linear, rows_matmul, why_not_fp8
from tests.kernels.launches import assert_compiles_whole, relative_error


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = rows_matmul(*quantize_rows(x), *quantize_rows(weight), bias, x.dtype)
    return out


def same_codes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(64,), (5, 48), (2, 3, 17), (2, 0, 16)])
def test_rows_are_rounded_as_everywhere(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = gaussian(*shape, dtype=dtype)
    codes, scale = quantize_rows(x)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (E4M3, x.shape, torch.float32, (*shape[:-1], 1))
    assert torch.equal(scale, fp8_scale(x, -1))
    assert same_codes(codes, to_fp8(x, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_a_product(dtype: torch.dtype) -> None:
    x, weight, bias = gaussian(64, 512), gaussian(256, 512, seed=1) / 16, gaussian(256, seed=2)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    error = relative_error(product(x, weight), x.double() @ weight.double().mT)
    # Each factor contributes .0265: E4M3 numbers lie between 1/8 and 1/16 of their size apart.
    assert 0.03 < error < 0.04
    # The rounding of the factors is the only error.
    rounded = from_fp8(*quantize_rows(x)).double() @ from_fp8(*quantize_rows(weight)).double().mT + bias.double()
    assert relative_error(product(x, weight, bias), rounded) < (1e-6 if dtype == torch.float32 else 3e-3)


def test_a_token_touches_no_other() -> None:
    x, weight = gaussian(2, 8, 64), gaussian(32, 64, seed=1)
    plain = product(x, weight)
    for value in (1e30, torch.inf, torch.nan):
        odd = x.clone()
        odd[1, 3, 5] = value
        found = product(odd, weight)
        others = torch.ones(2, 8, dtype=torch.bool)
        others[1, 3] = False
        assert torch.equal(found[others], plain[others])
        assert value == 1e30 or not found[1, 3].isfinite().any()
    assert product(odd, weight).isnan()[1, 3].all()


def test_zeros_and_weights_that_are_not_finite() -> None:
    weight = gaussian(16, 32)
    assert torch.equal(product(torch.zeros(3, 32), weight), torch.zeros(3, 16))
    weight[4, 4] = torch.nan
    found = product(gaussian(3, 32, seed=1), weight)
    assert found[:, 4].isnan().all()
    assert found[:, torch.arange(16) != 4].isfinite().all()


def test_gradients_pass_the_rounding_by() -> None:
    x, weight, bias = gaussian(2, 3, 32), gaussian(16, 32, seed=1), gaussian(16, seed=2)
    leaves = [each.requires_grad_() for each in (x, weight, bias)]
    codes, scale = quantize_rows(x.detach())
    rounded, weight_scale = quantize_rows(weight.detach())
    gradient = gaussian(2, 3, 16, seed=3)
    out = rows_linear(x, codes, scale, rounded, weight_scale, bias, weight)
    found = torch.autograd.grad(out, leaves, gradient)
    expected = (
        gradient @ from_fp8(rounded, weight_scale),
        gradient.flatten(0, 1).mT @ x.detach().flatten(0, 1),
        gradient.sum((0, 1)),
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # Tensors that need no gradient are not kept for the backward pass.
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        rows_linear(x, codes, scale, rounded, weight_scale, bias, None)
    assert sorted(each.numel() for each in held) == [16, 16 * 32]


def test_under_mixed_precision_sums_stay_wide() -> None:
    x, weight = gaussian(4, 64), gaussian(32, 64, seed=1)
    plain = product(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(x, weight), plain)


def test_operations_are_registered_rightly() -> None:
    codes, scale = quantize_rows(gaussian(3, 32))
    weight, weight_scale = quantize_rows(gaussian(16, 32))
    # The schema check is left out, because it multiplies its inputs and torch cannot multiply E4M3 tensors.
    checks: dict[str, Any] = {
        "test_utils": ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    }
    torch.library.opcheck(quantize_rows, (gaussian(3, 32),), **checks)
    torch.library.opcheck(rows_matmul, (codes, scale, weight, weight_scale, gaussian(16), torch.bfloat16), **checks)
    x, bias, original = (gaussian(*shape).requires_grad_() for shape in ((3, 32), (16,), (16, 32)))
    torch.library.opcheck(rows_linear, (x, codes, scale, weight, weight_scale, bias, original), **checks)


@pytest.mark.slow
def test_compiled() -> None:
    weight, weight_scale = quantize_rows(gaussian(16, 32))
    assert_compiles_whole(
        lambda x: rows_matmul(*quantize_rows(x), weight, weight_scale, None, x.dtype), gaussian(3, 32)
    )


CODES, SCALE = naive.quantize_rows(torch.ones(3, 32))
WEIGHT, WEIGHT_SCALE = naive.quantize_rows(torch.ones(16, 32))
GOOD = {"codes": CODES, "scale": SCALE, "weight": WEIGHT, "weight_scale": WEIGHT_SCALE, "bias": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.ones(3, 32)}, "must be torch.float8_e4m3fn, got torch.float32"),
        ({"codes": CODES[:, :16]}, r"with the same K, got \(3, 16\) and \(16, 32\)"),
        ({"scale": SCALE[:2]}, r"scale must be float32 of shape \(3, 1\)"),
        ({"weight_scale": WEIGHT_SCALE.bfloat16()}, "got torch.bfloat16"),
        ({"bias": torch.ones(3)}, r"bias must be \(16,\), got \(3,\)"),
        ({"scale": SCALE.to("meta")}, "all tensors on one device"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows_matmul(**{**GOOD, **change}, dtype=torch.float32)


@pytest.mark.parametrize("x", [torch.tensor(1.0), torch.ones(3, 0), torch.ones(3, 4, dtype=torch.int32)])
def test_what_has_no_rows_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="x must be"):
        quantize_rows(x)


def test_why_a_processor_has_none() -> None:
    assert why_not_fp8(torch.device("cpu")) == "cpu has no FP8 matrix product"
