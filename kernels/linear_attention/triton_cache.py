"""How a processor's on-chip memory is shared between the tiles of a kernel and its first cache."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

_PREFER_NONE = 0
_CARVEOUT = 9
"""CU_FUNC_CACHE_PREFER_NONE and CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT of the CUDA driver."""
_reserved: dict[int, int] = {}
"""Handle of a kernel -> what was asked for last."""


def reserve(kernel: Any, percent: int) -> None:
    """Ask for `percent` of the on-chip memory for tiles, from the second launch on; 0 leaves it to the compiler.

    Triton asks for as much as there is where a kernel has tiles of more than 48 KiB, which leaves little to a kernel
    that reads its neighbours' rows again. It is a hint: what the tiles need they get.

    Args:
        kernel: what a launch returned; None from the interpreter.
    """
    function = getattr(kernel, "function", None)
    # On ROCm a handle is none of CUDA's driver, which may be there all the same.
    if percent <= 0 or not isinstance(function, int) or torch.version.cuda is None:
        return
    # Another launch of the same kernel may have asked for another share since.
    if _reserved.get(function) != percent:
        _reserved[function] = percent
        _ask(function, percent)


def _ask(function: int, percent: int) -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no Linux, or no NVIDIA: slower, not wrong
        return
    driver.cuFuncSetCacheConfig(ctypes.c_void_p(function), _PREFER_NONE)
    driver.cuFuncSetAttribute(ctypes.c_void_p(function), _CARVEOUT, percent)
