"""Expansion of packed weights in Triton's interpreter: equal to the reference bit by bit.

`test_interpreted.py` runs this file.
"""

from __future__ import annotations

import pytest
import torch

from postgen.kernels.fp8 import E4M3
from postgen.kernels.weight_expand import naive, triton
from postgen.kernels.weight_expand.ops import row_scale_of
from tests.kernels.interpreted_fp8_rows import assert_same_codes
from tests.kernels.poison import poisoned_memory
from tests.kernels.weight_expand_cases import CASES, Case, planes_of


@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes(case: Case) -> None:
    for dtype in (torch.float32, torch.float16, torch.float64):
        with poisoned_memory():
            found = triton.expand(*case.arguments(dtype))
        assert (found.dtype, found.shape) == (dtype, (case.rows, case.channels))
        assert torch.equal(found, naive.expand(*case.arguments(dtype)))


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_eight_bits(case: Case) -> None:
    numbers = naive.expand(*case.arguments(torch.float32))
    for dtype in (E4M3, torch.int8):
        given = case.arguments(dtype, row_scale_of(numbers, dtype))
        with poisoned_memory():
            found = triton.expand(*given)
        if dtype == E4M3:
            assert_same_codes(found, naive.expand(*given))
        else:
            assert torch.equal(found, naive.expand(*given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("planes", "rows", "channels", "group"), [(2, 5, 64, 64), (3, 7, 192, 32), (4, 3, 60, 20)])
def test_planes(planes: int, rows: int, channels: int, group: int, dtype: torch.dtype) -> None:
    streams, coefficients = planes_of(planes, rows, channels, group, dtype)
    with poisoned_memory():
        found = triton.expand_planes(streams, coefficients, None, channels, torch.float32)
    expected = naive.expand_planes(streams, coefficients, None, channels, torch.float32)
    assert torch.equal(found, expected)
    scale = row_scale_of(expected, torch.int8)
    found = triton.expand_planes(streams, coefficients, scale, channels, torch.int8)
    assert torch.equal(found, naive.expand_planes(streams, coefficients, scale, channels, torch.int8))
