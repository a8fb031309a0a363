"""Set the division of a GPU processor's on-chip memory between shared memory (tiles) and the L1 cache."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

_PREFER_NONE = 0
_CARVEOUT = 9
"""CU_FUNC_CACHE_PREFER_NONE and CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT of the CUDA driver."""
_reserved: dict[int, int] = {}
"""Handle of a kernel -> the percentage that was requested last."""


def reserve(kernel: Any, percent: int) -> None:
    """Request a share of the on-chip memory as shared memory, for later launches of a kernel.

    Triton requests all of it if a kernel needs more than 48 KiB of shared memory. This leaves little L1 cache for a
    kernel whose programs read the same rows as their neighbours. The request is only a hint: the kernel always gets
    the shared memory that it needs.

    Args:
        kernel: the return value of a Triton launch; None from the interpreter.
        percent: share of the on-chip memory, in percent; 0 does not change the setting of Triton.
    """
    function = getattr(kernel, "function", None)
    # On ROCm the handle does not belong to the CUDA driver, although the driver may be installed too.
    if percent <= 0 or not isinstance(function, int) or torch.version.cuda is None:
        return
    # A launch of the same kernel may have requested another share in the meantime.
    if _reserved.get(function) != percent:
        _reserved[function] = percent
        _ask(function, percent)


def _ask(function: int, percent: int) -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # not Linux or no NVIDIA driver: the kernel is only slower
        return
    driver.cuFuncSetCacheConfig(ctypes.c_void_p(function), _PREFER_NONE)
    driver.cuFuncSetAttribute(ctypes.c_void_p(function), _CARVEOUT, percent)
