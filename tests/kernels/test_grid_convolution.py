"""Depth-wise convolutions of tokens in a grid: against torch's layers, gradients, and refused arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, library
from torch.nn import functional

from postgen.kernels.grid_convolution import naive
from postgen.kernels.grid_convolution.ops import grid_convolution
from tests.kernels.grid_convolution_cases import CASES, case

GRID = (3, 2, 4)


@pytest.mark.parametrize("name", CASES)
def test_equals_a_convolution_of_the_clip(name: str) -> None:
    x, space, time, added = case(name, GRID, 2, 6, torch.float64)
    filters = torch.zeros(12, 1, 5, 5, 5, dtype=torch.float64)
    for weight in (space, time):
        if weight is not None and weight.dim() == 3:
            edge = (5 - weight.shape[1]) // 2
            filters[:, 0, 2] += functional.pad(weight, [edge] * 4)
        elif weight is not None:
            edge = (5 - weight.shape[1]) // 2
            filters[:, 0, :, 2, 2] += functional.pad(weight, [edge] * 2)
    filters[:, 0, 2, 2, 2] += float(added)
    clip = x.reshape(2, *GRID, 12).permute(0, 4, 1, 2, 3)
    expected = functional.conv3d(clip, filters, padding=2, groups=12).permute(0, 2, 3, 4, 1).reshape(x.shape)
    torch.testing.assert_close(grid_convolution(x, space, time, GRID, added=added), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    x, space, time, added = case(name, GRID, 1, 2, torch.float64)
    given = [None if each is None else each.double().requires_grad_() for each in (x, space, time)]
    assert torch.autograd.gradcheck(
        lambda a, b, c: grid_convolution(a, b, c, GRID, added=added), given, fast_mode=True
    )


def test_is_registered_well() -> None:
    x, space, time, added = case("both", GRID, 1, 4, torch.float32)
    given = tuple(each.requires_grad_() for each in (x.contiguous(), space, time) if each is not None)
    library.opcheck(torch.ops.postgen.grid_convolution.default, (*given, list(GRID), added))


def test_half_precision_is_rounded_once() -> None:
    x, space, time, added = case("both", GRID, 2, 4, torch.bfloat16)
    found = grid_convolution(x, space, time, GRID, added=added)
    assert torch.equal(found, naive.grid_convolution(x.float(), space, time, GRID, added).bfloat16())


def test_autocast_leaves_it_in_float32() -> None:
    x, space, time, added = case("both", GRID, 1, 4, torch.float32)
    given = [each.clone().requires_grad_() for each in (x, space, time) if each is not None]

    def found() -> list[Tensor]:
        out = grid_convolution(*given, GRID, added=added)
        return [out, *torch.autograd.grad(out.square().sum(), given)]

    expected = found()
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in zip(found(), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "space", "grid", "message"),
    [
        (torch.ones(1, 6, 4), torch.ones(4, 3, 3), (1, 2, 3), r"x must be floating-point, \(B, N, H, D\)"),
        (torch.ones(1, 6, 1, 4).long(), torch.ones(4, 3, 3), (1, 2, 3), "floating-point.*int64"),
        (torch.ones(1, 6, 1, 4), torch.ones(4, 3, 3), (1, 2, 2), r"the number of tokens, 6, got \(1, 2, 2\)"),
        (torch.ones(1, 6, 1, 4), None, (1, 2, 3), "both space and time are None"),
        (torch.ones(1, 6, 1, 4), torch.ones(4, 2, 2), (1, 2, 3), r"space must be \(4, an odd side, an odd side\)"),
        (
            torch.ones(1, 6, 1, 4),
            torch.ones(4, 3, 3).long(),
            (1, 2, 3),
            "space must be floating-point, got torch.int64",
        ),
        (torch.ones(1, 6, 1, 4), torch.ones(3, 3, 3), (1, 2, 3), r"space must be \(4, .* got \(3, 3, 3\)"),
        (torch.ones(1, 6, 1, 4), torch.ones(4, 3, 3, device="meta"), (1, 2, 3), "one device, got cpu and meta"),
    ],
)
def test_what_does_not_belong_together(
    x: Tensor, space: Tensor | None, grid: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grid_convolution(x, space, None, grid)
