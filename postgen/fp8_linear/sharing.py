"""One quantisation for the queries, keys and values that are made of the same tokens.

Layers are called one after the other, so each thread keeps the last result, for as long as the tokens live and nobody
has written into them. In a CUDA graph and in inference mode, where writing cannot be seen, nothing is kept; compiled
code puts the three into one pass itself.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from postgen.kernels.fp8_rows import naive
from postgen.kernels.fp8_rows.ops import quantize_rows


class _Kept:
    """Codes of a tensor, dropped when it dies."""

    __slots__ = ("__weakref__", "dtype", "result", "source", "version")

    def __init__(self, x: Tensor, dtype: torch.dtype, result: tuple[Tensor, Tensor]) -> None:
        # Weak in both directions: a cycle would keep the codes until Python looks for cycles.
        own = weakref.ref(self)
        self.source = weakref.ref(x, lambda _: _forget(own))
        self.version, self.dtype = x._version, dtype
        self.result: tuple[Tensor, Tensor] | None = result

    def of(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return the codes of x as it is now, if these are they."""
        same = self.source() is x and self.version == x._version and self.dtype == dtype
        return self.result if same else None


class _Last(threading.local):
    kept: _Kept | None = None


_last = _Last()


def quantized(x: Tensor, dtype: torch.dtype, *, shared: bool, inline: bool) -> tuple[Tensor, Tensor]:
    """Return the rows of x in E4M3, and their scales.

    Args:
        x: (..., K).
        dtype: x is rounded to it first, as mixed precision does.
        shared: whether layers that follow read the same tensor.
        inline: whether a compiler may fuse it with what is around it.
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
    # What was computed before a graph was recorded would be missing in its replays.
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _forget(kept: weakref.ref[_Kept]) -> None:
    if (found := kept()) is not None:
        found.result = None
