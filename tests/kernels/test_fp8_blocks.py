"""Parts and blocks in E4M3: rounding, errors, gradients, shapes, refused arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from postgen.kernels.fp8 import E4M3, to_fp8
from postgen.kernels.fp8_blocks import naive
from postgen.kernels.fp8_blocks.ops import blocks_linear, blocks_matmul, quantize_parts, why_not_blocks
from postgen.kernels.fp8_rows.ops import quantize_rows, rows_matmul
from postgen.quant import format_of, quantize_tensor
from tests.kernels.launches import assert_compiles_whole, relative_error


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_parts_have_scales_of_their_own() -> None:
    x = gaussian(2, 3, 384)
    x[..., 128:256] *= 1000
    codes, scale = quantize_parts(x)
    assert (codes.dtype, codes.shape, scale.shape, scale.is_contiguous()) == (E4M3, x.shape, (3, 6), True)
    for part in range(3):
        some = x[..., 128 * part : 128 * (part + 1)].reshape(6, 128)
        torch.testing.assert_close(scale[part], some.abs().amax(-1) / 448)
        expected = to_fp8(some, scale[part][:, None])
        assert torch.equal(codes.view(6, 384)[:, 128 * part : 128 * (part + 1)].float(), expected.float())


def test_the_weight_is_that_of_the_format() -> None:
    weight = gaussian(200, 256)
    codes, scale = naive.quantize_blocks(weight)
    assert (codes.shape, scale.shape) == ((200, 256), (2, 2))
    expected = quantize_tensor(weight, format_of("fp8:block")).numbers()
    assert torch.equal(naive.weight_of(codes, scale, torch.float32), expected)


def test_fine_scales_help_where_parts_differ() -> None:
    x, weight = gaussian(40, 512), gaussian(144, 512, seed=1)
    x[:, :128] *= 1e5
    weight[:, :128] /= 1e5
    exact = x.double() @ weight.double().mT
    blocks = blocks_matmul(*quantize_parts(x), *naive.quantize_blocks(weight), None, torch.float32)
    rows = rows_matmul(*quantize_rows(x), *quantize_rows(weight), None, torch.float32)
    # With a scale per row, the other parts are near the smallest E4M3 numbers, which lie far apart.
    assert relative_error(rows, exact) > 0.3
    assert relative_error(blocks, exact) < 0.04


def test_gradients_pass_the_rounding_by() -> None:
    x, weight, bias = gaussian(2, 3, 128), gaussian(16, 128, seed=1), gaussian(16, seed=2)
    leaves = [each.requires_grad_() for each in (x, weight, bias)]
    rounded, weight_scale = naive.quantize_blocks(weight.detach())
    out = blocks_linear(x, *quantize_parts(x.detach()), rounded, weight_scale, bias, None)
    found = torch.autograd.grad(out, (x, bias), torch.ones_like(out))
    torch.testing.assert_close(found[0][0, 0], naive.weight_of(rounded, weight_scale, torch.float32).sum(0))
    assert torch.equal(found[1], torch.full((16,), 6.0))
    assert len(leaves) == 3


def test_operations_are_registered_rightly() -> None:
    codes, scale = quantize_parts(gaussian(3, 128))
    weight, weight_scale = naive.quantize_blocks(gaussian(16, 128))
    # The schema check is left out, because it multiplies its inputs and torch cannot multiply E4M3 tensors.
    checks: dict[str, Any] = {
        "test_utils": ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    }
    torch.library.opcheck(quantize_parts, (gaussian(2, 3, 128),), **checks)
    torch.library.opcheck(blocks_matmul, (codes, scale, weight, weight_scale, gaussian(16), torch.bfloat16), **checks)
    x, bias = gaussian(3, 128).requires_grad_(), gaussian(16).requires_grad_()
    torch.library.opcheck(blocks_linear, (x, codes, scale, weight, weight_scale, bias, None), **checks)


@pytest.mark.slow
def test_compiled() -> None:
    weight, weight_scale = naive.quantize_blocks(gaussian(16, 128))
    assert_compiles_whole(
        lambda x: blocks_matmul(*quantize_parts(x), weight, weight_scale, None, x.dtype), gaussian(3, 128)
    )


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 128 long"):
        quantize_parts(torch.ones(3, 100))
    codes, scale = quantize_parts(torch.ones(2, 3, 256))
    weight, weight_scale = naive.quantize_blocks(torch.ones(130, 256))
    blocks_matmul(codes, scale, weight, weight_scale, None, torch.float32)
    with pytest.raises(ValueError, match=r"scale must be float32 of shape \(2, 6\)"):
        blocks_matmul(codes, scale.T, weight, weight_scale, None, torch.float32)
    with pytest.raises(ValueError, match=r"scale must be float32 of shape \(2, 2\)"):
        blocks_matmul(codes, scale, weight, weight_scale[:1], None, torch.float32)
    assert why_not_blocks(torch.device("cpu")) == "cpu has no FP8 matrix product"
