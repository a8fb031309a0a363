"""One shared quantisation of the tokens that the query, key and value projections read.

The three layers run one after the other. So each thread keeps the last result until the input tensor is freed or
written to. Nothing is kept while a CUDA graph is recorded or in inference mode, where a write cannot be detected.
torch.compile merges the three quantisations itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Rows = tuple[Tensor, Tensor]
"""Codes of the rows of a tensor, and their scales."""


def shared_rows(x: Tensor, key: Hashable, quantize: Callable[[], Rows]) -> Rows:
    """Return the quantised rows of x: those of the last call with the same x, content and key, if there are any.

    Args:
        x: the tensor that the layers read.
        key: how it is quantised.
        quantize: quantises it.
    """
    if torch.compiler.is_compiling() or x.is_inference() or _captured(x):
        return quantize()
    kept = _last.kept
    found = None if kept is None else kept.of(x, key)
    if found is None:
        found = quantize()
        _last.kept = _Kept(x, key, found)
    return found


class _Kept:
    """The codes of a tensor, which are dropped when the tensor is freed."""

    __slots__ = ("__weakref__", "key", "result", "source", "version")

    def __init__(self, x: Tensor, key: Hashable, result: Rows) -> None:
        # Weak references in both directions: a cycle would keep the codes until the garbage collector runs.
        own = weakref.ref(self)
        self.source = weakref.ref(x, lambda _: _forget(own))
        self.version, self.key = x._version, key
        self.result: Rows | None = result

    def of(self, x: Tensor, key: Hashable) -> Rows | None:
        """Return the kept codes if they are those of the current content of x under this key, else None."""
        same = self.source() is x and self.version == x._version and self.key == key
        return self.result if same else None


class _Last(threading.local):
    kept: _Kept | None = None


_last = _Last()


def _captured(x: Tensor) -> bool:
    # A CUDA graph would not contain a quantisation that ran before its recording.
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _forget(kept: weakref.ref[_Kept]) -> None:
    if (found := kept()) is not None:
        found.result = None
