"""Grid convolutions and their gradients in Triton's interpreter. `test_interpreted.py` runs this file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from postgen.kernels.grid_convolution import naive, triton
from tests.kernels.grid_convolution_cases import CASES, case
from tests.kernels.launches import relative_error
from tests.kernels.poison import poisoned_memory


@pytest.mark.parametrize(("name", "grid"), [*((name, (3, 3, 5)) for name in CASES), ("both", (1, 3, 2))])
def test_equals_the_reference(name: str, grid: tuple[int, int, int]) -> None:
    x, space, time, added = case(name, grid, 1, 6, torch.float32)
    check(x, torch.randn(x.shape), space, time, grid, added, 1e-6, 1e-5)


def test_grids_below_the_filters_and_strides_of_channels() -> None:
    x, space, time, added = case("nothing added", (2, 1, 3), 1, 6, torch.float16)
    apart = torch.stack([x, x], dim=-1)[..., 0]
    check(apart, x.new_ones(()).expand(x.shape), space, time, (2, 1, 3), added, 5e-4, 5e-4)


def check(
    x: Tensor,
    gradient: Tensor,
    space: Tensor | None,
    time: Tensor | None,
    grid: tuple[int, int, int],
    added: bool,
    of_out: float,
    of_gradients: float,
) -> None:
    """Check the result and the gradients against float64 within the given relative errors."""
    with poisoned_memory():
        out = triton.grid_convolution(x, space, time, grid, added)
        found = triton.grid_convolution_backward(gradient, x, space, time, grid, added)
    exact = (None if each is None else each.double() for each in (space, time))
    of_space, of_time = exact
    assert relative_error(out, naive.grid_convolution(x.double(), of_space, of_time, grid, added)) < of_out
    expected = naive.grid_convolution_backward(gradient.double(), x.double(), of_space, of_time, grid, added)
    for of_kernel, of_formula in zip(found, expected, strict=True):
        assert (of_kernel is None) == (of_formula is None)
        if of_kernel is not None and of_formula is not None:
            assert relative_error(of_kernel, of_formula) < of_gradients
