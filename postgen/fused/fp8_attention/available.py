"""Checks whether this machine can compute FP8 attention."""

from __future__ import annotations

from typing import Any

import torch

from postgen.errors import UserError
from postgen.kernels.attention_fp8 import graphs


def check_available(device: torch.device | None = None, channels: int = 128) -> None:
    """Check that a device can compute FP8 attention; the check runs no kernel.

    Args:
        device: the device of the model. For None and for a CPU (an offloaded model) the current GPU is checked.
        channels: the number of channels per head.

    Raises:
        UserError: the device cannot; the message names what is missing.
    """
    if (device is None or device.type != "cuda") and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    reason = graphs.refusal(device or torch.device("cpu"), channels)
    if reason is not None:
        raise UserError(
            f"FP8 attention {reason}. Leave it off, or use simulate to compute the same numbers slowly on any device"
        )


def head_channels(module: Any) -> int | None:
    """Return the number of channels per head of an attention module, or None if the module does not show it."""
    for name in ("to_q", "to_qkv"):
        width = getattr(getattr(module, name, None), "out_features", None)
        heads = getattr(module, "heads", None)
        if isinstance(width, int) and isinstance(heads, int) and heads:
            return width // heads // (3 if name == "to_qkv" else 1)
    return None
