"""Rotation of rows: orthogonality, linear layers that stay the same, codes, gradients, refused arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.kernels.fp8 import E4M3
from postgen.kernels.fp8_rows import naive as fp8_rows
from postgen.kernels.hadamard_rows import naive, triton
from postgen.kernels.hadamard_rows.ops import rotate, rotate_quantize
from postgen.kernels.int8_rows import naive as int8_rows
from tests.kernels.launches import assert_compiles_whole, relative_error


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def signs_of(channels: int) -> Tensor:
    return torch.randint(0, 2, (channels,), generator=torch.Generator().manual_seed(5)) * 2.0 - 1


@pytest.mark.parametrize("block", [1, 2, 16, 256])
@pytest.mark.parametrize("with_signs", [False, True])
def test_a_rotation_keeps_norms_and_products(block: int, with_signs: bool) -> None:
    x, weight = gaussian(2, 5, 768).double(), gaussian(12, 768, seed=1).double()
    signs = signs_of(768) if with_signs else None
    turned, other = rotate(x, block, signs), rotate(weight, block, signs)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned @ other.mT, x @ weight.mT)
    torch.testing.assert_close(naive.rotate_back(turned, block, signs), x)


def test_four_channels_by_hand() -> None:
    x = torch.tensor([[1.0, 2, 3, 4, 8, 0, 0, 0]])
    assert rotate(x, 4).tolist() == [[5, -1, -2, 0, 4, 4, 4, 4]]
    signs = torch.tensor([1.0, -1, 1, -1, -1, 1, 1, 1])
    assert rotate(x, 4, signs).tolist() == [[-1, 5, 0, -2, -4, -4, -4, -4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_those_of_the_rotated_rows(dtype: torch.dtype) -> None:
    x, signs = gaussian(2, 3, 96).to(dtype), signs_of(96)
    turned = rotate(x.float(), 32, signs)
    for kind, quantize in ((E4M3, fp8_rows.quantize_rows), (torch.int8, int8_rows.quantize_rows)):
        codes, scale = rotate_quantize(x, 32, signs, kind)
        expected, expected_scale = quantize(turned)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(codes.float(), expected.float())


def test_a_rotation_lowers_the_error_of_int8_with_outliers() -> None:
    x, weight = gaussian(64, 512), gaussian(32, 512, seed=1)
    x[:, 7] *= 60
    exact = x.double() @ weight.double().mT
    plain = int8_rows.rows_matmul(*int8_rows.quantize_rows(x), *int8_rows.quantize_rows(weight), None, torch.float32)
    turned = [rotate_quantize(each, 128, None, torch.int8) for each in (x, weight)]
    rotated = int8_rows.rows_matmul(*turned[0], *turned[1], None, torch.float32)
    assert relative_error(rotated, exact) < relative_error(plain, exact) / 2


def test_gradients_and_mixed_precision() -> None:
    x = gaussian(3, 32).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate(x, 8, signs_of(32)), (x,))
    plain = rotate(gaussian(3, 32), 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotate(gaussian(3, 32), 8), plain)


def test_the_operation_is_registered_rightly() -> None:
    checks: dict[str, Any] = {
        "test_utils": ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    }
    for dtype in (E4M3, torch.int8):
        torch.library.opcheck(rotate_quantize, (gaussian(2, 3, 32), 16, signs_of(32), dtype), **checks)


@pytest.mark.slow
def test_compiled() -> None:
    assert_compiles_whole(lambda x: rotate_quantize(x, 8, None, torch.int8), gaussian(3, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3, 48), 32, None, E4M3), "power of two up to 4096 that divides the 48 channels, got 32"),
        ((torch.ones(3, 48), 12, None, E4M3), "got 12"),
        ((torch.ones(3, 8192), 8192, None, E4M3), "got 8192"),
        ((torch.ones(3, 48), 16, torch.ones(16), E4M3), r"signs must be \(48,\), got \(16,\)"),
        ((torch.ones(3, 48), 16, torch.ones(48, device="meta"), E4M3), "all tensors on one device"),
        ((torch.ones(3, 48), 16, None, torch.float16), "dtype must be torch.float8_e4m3fn or torch.int8"),
        ((torch.ones(3, 48, dtype=torch.int32), 16, None, E4M3), "x must be"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotate_quantize(*arguments)


def test_rows_that_the_kernel_cannot_hold() -> None:
    long = torch.empty(1, 32768)
    assert triton.why_not(long, 128) is None
    assert triton.why_not(long, 256) == "rows have 32768 numbers, at most 16384 fit with blocks of 256"
    assert triton.why_not(torch.empty(1, 65536), 16) is not None


def test_a_rotation_in_inference_mode_does_not_spoil_later_gradients() -> None:
    with torch.inference_mode():
        rotate(gaussian(2, 64), 64)
    x = gaussian(2, 64).requires_grad_()
    rotate(x, 64).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_the_matrix_is_sylvesters() -> None:
    expected = torch.ones(1, 1)
    for power in range(13):
        assert torch.equal(naive.hadamard(2**power), expected)
        expected = torch.cat([torch.cat([expected, expected], 1), torch.cat([expected, -expected], 1)])
