"""The norm before a convolution of Wan's autoencoder, on a GPU with the sizes of training."""

from __future__ import annotations

import pytest
import torch

from postgen.kernels.norm_silu import naive
from postgen.kernels.norm_silu.ops import norm_silu_pad, norm_silu_pad_backward
from tests.kernels.launches import assert_compiles_whole, assert_records, assert_repeats, relative_error
from tests.kernels.poison import poisoned_memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
LAST = torch.channels_last_3d


@pytest.mark.parametrize("shape", [(2, 64, 9, 64, 64), (3, 32, 1, 37, 41), (1, 96, 5, 60, 104), (1, 384, 2, 7, 9)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=LAST)
    gamma = torch.rand(shape[1], device="cuda") + 0.5
    with poisoned_memory():
        found = norm_silu_pad(x, gamma)
        gradient = torch.randn_like(found)
        of_x, of_gamma = norm_silu_pad_backward(gradient, x, gamma)
    tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-5
    assert found.is_contiguous(memory_format=LAST)
    assert relative_error(found, naive.norm_silu_pad(x.double(), gamma.double())) < tolerance
    expected = naive.norm_silu_pad_backward(gradient.double(), x.double(), gamma.double())
    assert relative_error(of_x, expected[0]) < tolerance
    assert relative_error(of_gamma, expected[1]) < 1e-4


def test_repeats_records_and_compiles() -> None:
    x = torch.randn(1, 64, 5, 32, 32, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=LAST)
    gamma = torch.rand(64, device="cuda")
    assert_repeats(lambda: norm_silu_pad(x, gamma))
    assert_records(lambda: norm_silu_pad(x, gamma))
    assert_compiles_whole(lambda a, b: norm_silu_pad(a, b) * 2, x, gamma)
