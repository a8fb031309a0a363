"""Grid convolutions with the convolution kernel of linear attention, called without queries.

`added` adds 1 to the weight at the centre of the kernel, so adding x takes no extra time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.kernels.dispatch import launching_on
from postgen.kernels.linear_attention.naive import Terms
from postgen.kernels.linear_attention.triton_strips import convolve, grad_filters

Grid = tuple[int, int, int]


def grid_convolution(x: Tensor, space: Tensor | None, time: Tensor | None, grid: Grid, added: bool) -> Tensor:
    """Compute `naive.grid_convolution`; `ops.py` has checked the shapes. x may have any strides and is not copied."""
    # Without queries the kernel computes the transposed convolution, which flips the weights. Flipping them here
    # first gives the plain convolution.
    turned = [None if weight is None else weight.flip(tuple(range(1, weight.dim()))) for weight in (space, time)]
    return _transposed(x, turned[0], turned[1], grid, added)


def grid_convolution_backward(
    gradient: Tensor, x: Tensor, space: Tensor | None, time: Tensor | None, grid: Grid, added: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute `naive.grid_convolution_backward`."""
    of_x = _transposed(gradient, space, time, grid, added)
    with launching_on(x):
        of_space, of_time = grad_filters(gradient, x, Terms(grid=grid, conv_space=space, conv_time=time))
    return of_x, of_space, of_time


def _transposed(x: Tensor, space: Tensor | None, time: Tensor | None, grid: Grid, added: bool) -> Tensor:
    """Return the transposed convolutions of x, plus x itself if `added`."""
    space, time = (None if weight is None else weight.float() for weight in (space, time))
    if added and space is not None:
        space = space.clone()
        space[:, space.shape[1] // 2, space.shape[2] // 2] += 1
    elif added and time is not None:
        time = time.clone()
        time[:, time.shape[1] // 2] += 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with launching_on(x):
        convolve(x, None, None, Terms(grid=grid, conv_space=space, conv_time=time), None, out)
    return out
