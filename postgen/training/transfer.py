"""From the host to the device without a wait: a plain `.to` lets the host stand until all queued work is done."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from the CPU to a GPU through pinned memory, in the order of the device's work.

    The tensor may be changed afterwards: its values are taken at once.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        # torch frees pinned memory for reuse only when the copies out of it are done.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")
