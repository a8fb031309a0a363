"""The choice between the Triton kernel of an operation and plain torch, with a warning if a GPU gets plain torch."""

from __future__ import annotations

import importlib.util
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes that the Triton kernels read."""
THERE = importlib.util.find_spec("triton") is not None
"""Whether the package triton is installed; a constant, so that torch.compile can trace it."""


def for_triton(*tensors: Tensor) -> bool:
    """Return whether a Triton kernel could run on these tensors, without a warning; torch.compile can trace it."""
    return THERE and all(tensor.is_cuda and tensor.dtype in DTYPES for tensor in tensors)


def uses_triton(operation: str, *tensors: Tensor, obstacle: str | None = None) -> bool:
    """Return whether the Triton kernel runs; warn once with the reason if tensors on a GPU prevent it.

    Args:
        operation: the name of the operation, for the warning.
        tensors: the inputs of the kernel.
        obstacle: a reason of the operation itself why the kernel cannot run, or None.
    """
    if not tensors[0].is_cuda:
        return False
    reason = obstacle or why_not_triton(*tensors)
    if reason is not None:
        warn_once(f"{operation} runs as plain torch, not as a fused kernel: {reason}", stacklevel=3)
    return reason is None


def why_not_triton(*tensors: Tensor) -> str | None:
    """Return why no Triton kernel can run on these tensors, or None if one can."""
    if any(tensor.dtype not in DTYPES for tensor in tensors):
        dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
        return f"the kernel reads bfloat16, float16 and float32, not {dtypes}"
    return None if THERE else "triton is not installed (pip install triton)"


def check_devices(operation: str, first: Tensor, *others: Tensor | None) -> None:
    """Check that all tensors are on one device; fake implementations call this too, for example on meta tensors.

    Raises:
        ValueError: the tensors are on several devices; the message names them.
    """
    strange = sorted({str(each.device) for each in others if each is not None and each.device != first.device})
    if strange:
        raise ValueError(
            f"{operation} needs all tensors on one device, got {first.device} and {', '.join(strange)}: move them to"
            " one device"
        )


def launching_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on the tensor's device instead of the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


TOLD: set[str] = set()
"""The messages that `warn_once` has issued in this process."""


def warn_once(message: str, stacklevel: int = 2) -> None:
    """Issue a warning once per process and message; `stacklevel` counts from the caller, as in `warnings.warn`."""
    if message not in TOLD:
        TOLD.add(message)
        warnings.warn(message, stacklevel=stacklevel + 1)
