"""Row-wise quantisation to E4M3 in Triton's interpreter: codes and scales equal those of the reference bit by bit.

`test_interpreted.py` runs this file.
"""

from __future__ import annotations

import pytest
import torch

from postgen.kernels.fp8_rows import naive, triton
from tests.kernels.poison import poisoned_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 48), (2, 1000), (1, 1, 2050), (2, 7680)])
def test_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[..., 0, :] *= 100
    check(x)


def test_gaps_between_rows() -> None:
    wide = torch.full((6, 80), torch.nan)
    wide[:, :48] = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    check(wide[:, :48])
    check(torch.randn(48, 6, generator=torch.Generator().manual_seed(0)).mT)


def test_zeros_and_what_is_not_finite() -> None:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[2, 3], x[3, 4], x[4, 5] = torch.nan, torch.inf, -torch.inf
    x[5] = 1e-38
    check(x)


def check(x: torch.Tensor) -> None:
    with poisoned_memory():
        codes, scale = triton.quantize_rows(x)
    expected, expected_scale = naive.quantize_rows(x)
    assert torch.equal(scale.nan_to_num(-1, -2), expected_scale.nan_to_num(-1, -2))
    assert_same_codes(codes, expected)
    assert codes.is_contiguous()


def assert_same_codes(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that E4M3 codes are equal; all codes of NaN count as equal."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found.float().nan_to_num(1000), expected.float().nan_to_num(1000))
