"""Which implementation of an operation runs: the Triton kernel where it can, else plain torch, and never silently."""

from __future__ import annotations

import importlib.util
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What our kernels read."""
THERE = importlib.util.find_spec("triton") is not None
"""Whether the package triton is installed: a constant where torch.compile traces."""


def for_triton(*tensors: Tensor) -> bool:
    """Say whether a Triton kernel of ours could take these tensors; without a warning, and traced by torch.compile."""
    return THERE and all(tensor.is_cuda and tensor.dtype in DTYPES for tensor in tensors)


def uses_triton(operation: str, *tensors: Tensor, obstacle: str | None = None) -> bool:
    """Say whether the Triton kernel runs; tensors on a GPU that it cannot take give one warning with the reason.

    Args:
        operation: its name, for the warning.
        tensors: what the kernel would read.
        obstacle: what the operation itself finds in the way.
    """
    if not tensors[0].is_cuda:
        return False
    reason = obstacle or why_not_triton(*tensors)
    if reason is not None:
        warn_once(f"{operation} runs as plain torch, not as a fused kernel: {reason}", stacklevel=3)
    return reason is None


def why_not_triton(*tensors: Tensor) -> str | None:
    """Return why no Triton kernel of ours can take these tensors, or None when one can."""
    if any(tensor.dtype not in DTYPES for tensor in tensors):
        dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
        return f"the kernel reads bfloat16, float16 and float32, not {dtypes}"
    return None if THERE else "triton is not installed (pip install triton)"


def check_devices(operation: str, first: Tensor, *others: Tensor | None) -> None:
    """Refuse tensors of several devices; for fake implementations too, which run where one of them is a meta tensor.

    Raises:
        ValueError: it names the devices.
    """
    strange = sorted({str(each.device) for each in others if each is not None and each.device != first.device})
    if strange:
        raise ValueError(
            f"{operation} takes tensors of one device, got {first.device} and {', '.join(strange)}: move them to one"
        )


def launching_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on the tensor's device: it takes the current one otherwise."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


TOLD: set[str] = set()
"""What `warn_once` has said in this process."""


def warn_once(message: str, stacklevel: int = 2) -> None:
    """Warn, the first time that this is said in the process; `stacklevel` counts from the caller, as in `warnings`."""
    if message not in TOLD:
        TOLD.add(message)
        warnings.warn(message, stacklevel=stacklevel + 1)
