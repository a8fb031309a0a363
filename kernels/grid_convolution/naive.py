"""Reference of the depth-wise convolutions of tokens in their grid, and of their gradients.

One convolution works within each frame with a square kernel, another one along time at the same place of neighbouring
frames. The result is their sum; with `added`, x itself is added too:

    y_n = (x_n) + sum_d w_space(d) x_{n + d} + sum_t w_time(t) x_{n + t frames}

The padding outside the grid is zero. Tokens are (B, T h w, H, D), with the columns as the fastest axis. Each channel
of each head has its own weights, (H * D, s, s) and (H * D, t), s and t odd. Sums are in float32 (float64 for float64)
and rounded once.
"""

from __future__ import annotations

from torch import Tensor

from postgen.kernels.linear_attention.naive import Terms, convolve, convolve_backward, exact


def grid_convolution(
    x: Tensor, space: Tensor | None, time: Tensor | None, grid: tuple[int, int, int], added: bool
) -> Tensor:
    """Return the sum of the convolutions, in the dtype of x.

    Args:
        x: tokens, (B, T h w, H, D).
        space: weights within a frame, (H * D, s, s); None for none.
        time: weights along time, (H * D, t); None for none.
        grid: T, h and w.
        added: whether to add x.
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
