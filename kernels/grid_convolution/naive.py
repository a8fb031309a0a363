"""Depth-wise convolutions of tokens in their grid: the reference, and the formulas of its gradients.

A frame is convolved in itself, by a square; and along time, over the same place of neighbouring frames. Both are added
up, and with `added` the tokens themselves are:

    y_n = (x_n) + sum_d w_space(d) x_{n + d} + sum_t w_time(t) x_{n + t frames}

Zeros lie outside the grid. Tokens are (B, T h w, H, D) and run over columns first; each channel of each head has its
own weights, (H * D, s, s) and (H * D, t), s and t odd. In float32 (float64 for float64), rounded once.
"""

from __future__ import annotations

from torch import Tensor

from postgen.kernels.linear_attention.naive import Terms, convolve, convolve_backward, exact


def grid_convolution(
    x: Tensor, space: Tensor | None, time: Tensor | None, grid: tuple[int, int, int], added: bool
) -> Tensor:
    """Return the convolutions in the dtype of x.

    Args:
        x: (B, T h w, H, D).
        space: (H * D, s, s); None for none.
        time: (H * D, t); None for none.
        grid: T, h and w.
        added: whether x itself is added.
    """
    full = exact(x)
    out = convolve(full, Terms(grid=grid, conv_space=space, conv_time=time))
    return (full + out if added else out).to(x.dtype)


def grid_convolution_backward(
    gradient: Tensor, x: Tensor, space: Tensor | None, time: Tensor | None, grid: tuple[int, int, int], added: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x and of the weights."""
    full = exact(gradient)
    terms = Terms(grid=grid, conv_space=space, conv_time=time)
    of_x, of_space, of_time = convolve_backward(full, exact(x), terms)
    return (full + of_x if added else of_x).to(x.dtype), of_space, of_time
