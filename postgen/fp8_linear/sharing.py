"""Quantisation of the tokens that FP8 linear layers read, which queries, keys and values share."""

from __future__ import annotations

import torch
from torch import Tensor

from postgen.families.shared_rows import shared_rows
from postgen.kernels.fp8_rows import naive
from postgen.kernels.fp8_rows.ops import quantize_rows


def quantized(x: Tensor, dtype: torch.dtype, *, shared: bool, inline: bool) -> tuple[Tensor, Tensor]:
    """Quantise the rows of x to E4M3.

    Args:
        x: (..., K).
        dtype: x is cast to this dtype first, as mixed precision does.
        shared: whether the layers that run next read the same tensor, so that the result is worth keeping.
        inline: whether torch.compile may fuse the quantisation with its neighbours.

    Returns:
        Codes (..., K) in E4M3 and scales (..., 1) in float32.
    """
    if torch.compiler.is_compiling() and inline:
        return naive.quantize_rows(x.detach().to(dtype))
    return shared_rows(x, dtype, lambda: _fresh(x, dtype)) if shared else _fresh(x, dtype)


def _fresh(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_rows(x.detach().to(dtype))
    return codes, scale
