"""Rotated and quantised rows in Triton's interpreter: the codes of the reference, up to rounding of the sums.

`test_interpreted.py` runs this file. The interpreter cannot multiply bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postgen.kernels.fp8 import E4M3
from postgen.kernels.hadamard_rows import naive, triton
from tests.kernels.interpreted_fp8_rows import assert_same_codes
from tests.kernels.poison import poisoned_memory

CASES = [(3, 16, 2), (9, 48, 16), (2, 384, 128), (3, 256, 256), (2, 4096, 2048), (3, 100, 4)]
"""(rows, channels, block): also blocks larger than the right matrix, and channels that 16 does not divide."""


def whole(*shape: int) -> Tensor:
    """Return small whole numbers, whose rotated sums are exact in any order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
@pytest.mark.parametrize("of", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "channels", "block"), CASES)
def test_equals_the_reference(rows: int, channels: int, block: int, of: torch.dtype, dtype: torch.dtype) -> None:
    signs = torch.randint(0, 2, (channels,), generator=torch.Generator().manual_seed(1)) * 2.0 - 1
    for given in (None, signs):
        check(whole(rows, channels).to(of), block, given, dtype)


def test_gaps_between_rows_and_what_is_not_finite() -> None:
    wide = torch.full((11, 80), torch.nan)
    wide[:, :64] = whole(11, 64)
    wide[1, :64] = 0
    wide[2, 3] = torch.nan
    check(wide[:, :64], 32, None, torch.int8)
    check(wide[:, :64], 32, None, E4M3)
    _, scale = triton.rotate_quantize(torch.full((1, 32), torch.inf), 32, None, torch.int8)
    assert not scale.isfinite().any()


def check(x: Tensor, block: int, signs: Tensor | None, dtype: torch.dtype) -> None:
    with poisoned_memory():
        codes, scale = triton.rotate_quantize(x, block, signs, dtype)
    expected, expected_scale = naive.rotate_quantize(x, block, signs, dtype)
    assert torch.equal(scale.nan_to_num(-1), expected_scale.nan_to_num(-1))
    assert (codes.dtype, codes.shape) == (dtype, x.shape)
    if dtype == E4M3:
        assert_same_codes(codes, expected)
    else:
        assert torch.equal(codes, expected)
