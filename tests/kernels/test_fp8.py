"""Scales and rounding of E4M3."""

from __future__ import annotations

import pytest
import torch

from postgen.kernels.fp8 import E4M3, E4M3_MAX, fp8_scale, from_fp8, to_fp8


def test_every_number_of_e4m3_comes_back() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    numbers = codes.float()[codes.float().isfinite()]
    assert numbers.abs().max() == E4M3_MAX
    scale = torch.tensor(0.5)
    assert torch.equal(from_fp8(to_fp8(numbers * 0.5, scale), scale), numbers * 0.5)


@pytest.mark.parametrize("dim", [None, -1, (0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_half_a_step(dim: int | tuple[int, ...] | None, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * 1e4).to(dtype)
    scale = fp8_scale(x, dim)
    assert scale.shape == {None: (1, 1, 1), -1: (3, 5, 1), (0, 1): (1, 1, 64)}[dim]
    error = (from_fp8(to_fp8(x, scale), scale) - x.float()).abs()
    # The mantissa has three bits; below 2^-6 the numbers are 2^-9 apart.
    assert (error <= torch.maximum(x.float().abs() / 16, scale * 2**-10) * 1.001).all()


def test_zeros_and_what_is_not_finite() -> None:
    zeros = torch.zeros(4, 8)
    scale = fp8_scale(zeros, -1)
    assert scale.isfinite().all()
    assert torch.equal(from_fp8(to_fp8(zeros, scale), scale), zeros)
    assert not fp8_scale(torch.tensor([1.0, torch.nan])).isfinite().any()
    assert not fp8_scale(torch.tensor([1.0, torch.inf])).isfinite().any()
    beyond = to_fp8(torch.tensor([1e6, -1e6]), torch.tensor(1.0))
    assert beyond.float().tolist() == [448, -448]
