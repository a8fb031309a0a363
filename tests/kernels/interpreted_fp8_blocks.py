"""Parts of 128 numbers in E4M3 in Triton's interpreter: codes and scales equal those of the reference bit by bit.

`test_interpreted.py` runs this file.
"""

from __future__ import annotations

import pytest
import torch

from postgen.kernels.fp8_blocks import naive, triton
from tests.kernels.interpreted_fp8_rows import assert_same_codes
from tests.kernels.poison import poisoned_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 128), (2, 35, 384)])
def test_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[..., :128] *= 100
    check(x)


def test_gaps_between_rows_and_what_is_not_finite() -> None:
    wide = torch.full((6, 300), torch.nan)
    wide[:, :256] = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    wide[1, :128] = 0
    wide[2, 3], wide[3, 200] = torch.nan, torch.inf
    check(wide[:, :256])


def check(x: torch.Tensor) -> None:
    with poisoned_memory():
        codes, scale = triton.quantize_parts(x)
    expected, expected_scale = naive.quantize_parts(x)
    assert scale.is_contiguous()
    assert torch.equal(scale.nan_to_num(-1, -2), expected_scale.nan_to_num(-1, -2))
    assert_same_codes(codes, expected)
