"""Grid convolutions and their gradients on a GPU, with the head sizes of Wan."""

from __future__ import annotations

import pytest
import torch

from postgen.kernels.grid_convolution import naive
from postgen.kernels.grid_convolution.ops import grid_convolution, grid_convolution_backward
from tests.kernels.grid_convolution_cases import CASES, case
from tests.kernels.launches import assert_compiles_whole, assert_records, assert_repeats, relative_error
from tests.kernels.poison import poisoned_memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize(
    ("name", "grid", "channels"),
    [*((name, (5, 30, 52), 128) for name in CASES), ("both", (3, 7, 11), 64), ("space", (1, 45, 80), 128)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equals_float64(name: str, grid: tuple[int, int, int], channels: int, dtype: torch.dtype) -> None:
    x, space, time, added = case(name, grid, 3, channels, dtype, "cuda")
    gradient = torch.randn(x.shape, device="cuda").to(dtype)
    with poisoned_memory():
        out = grid_convolution(x, space, time, grid, added=added)
        found = grid_convolution_backward(gradient, x, space, time, list(grid), added)
    tolerance = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    of_space, of_time = (None if each is None else each.double() for each in (space, time))
    assert relative_error(out, naive.grid_convolution(x.double(), of_space, of_time, grid, added)) < tolerance
    expected = naive.grid_convolution_backward(gradient.double(), x.double(), of_space, of_time, grid, added)
    for of_kernel, of_formula in zip(found, expected, strict=True):
        assert of_formula is None or relative_error(of_kernel, of_formula) < tolerance


def test_repeats_records_and_compiles() -> None:
    grid = (3, 15, 26)
    x, space, time, added = case("both", grid, 4, 128, torch.bfloat16, "cuda")
    assert_repeats(lambda: grid_convolution(x, space, time, grid, added=added))
    assert_records(lambda: grid_convolution(x, space, time, grid, added=added))
    assert_compiles_whole(lambda a, b, c: grid_convolution(a, b, c, grid, added=added) * 2, x, space, time)
