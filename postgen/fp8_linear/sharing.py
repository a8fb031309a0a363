"""One shared quantisation of the tokens that the query, key and value projections read.

The three layers run one after the other. So each thread keeps the last result until the input tensor is freed or
written to. Nothing is kept while a CUDA graph is recorded or in inference mode, where a write cannot be detected.
torch.compile merges the three quantisations itself.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from postgen.kernels.fp8_rows import naive
from postgen.kernels.fp8_rows.ops import quantize_rows


class _Kept:
    """The codes of a tensor, which are dropped when the tensor is freed."""

    __slots__ = ("__weakref__", "dtype", "result", "source", "version")

    def __init__(self, x: Tensor, dtype: torch.dtype, result: tuple[Tensor, Tensor]) -> None:
        # Weak references in both directions: a cycle would keep the codes until the garbage collector runs.
        own = weakref.ref(self)
        self.source = weakref.ref(x, lambda _: _forget(own))
        self.version, self.dtype = x._version, dtype
        self.result: tuple[Tensor, Tensor] | None = result

    def of(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return the kept codes if they are those of the current content of x in this dtype, else None."""
        same = self.source() is x and self.version == x._version and self.dtype == dtype
        return self.result if same else None


class _Last(threading.local):
    kept: _Kept | None = None


_last = _Last()


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
    if not shared or torch.compiler.is_compiling() or x.is_inference() or _captured(x):
        return _fresh(x, dtype)
    kept = _last.kept
    found = None if kept is None else kept.of(x, dtype)
    if found is None:
        found = _fresh(x, dtype)
        _last.kept = _Kept(x, dtype, found)
    return found


def _fresh(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_rows(x.detach().to(dtype))
    return codes, scale


def _captured(x: Tensor) -> bool:
    # A CUDA graph would not contain a quantisation that ran before its recording.
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _forget(kept: weakref.ref[_Kept]) -> None:
    if (found := kept()) is not None:
        found.result = None
