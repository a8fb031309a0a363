"""Asynchronous copies from host to device. A plain `.to` blocks the host until the GPU finishes all queued work."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. A copy from the CPU to a GPU uses pinned memory and does not block the host.

    The caller may change the original tensor afterwards, because its values are copied to pinned memory at once.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        # torch reuses this pinned memory only after the copies from it have finished.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")
