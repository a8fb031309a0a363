"""Whether this machine computes attention in E4M3."""

from __future__ import annotations

from typing import Any

import torch

from postgen.errors import UserError
from postgen.kernels.attention_fp8 import graphs


def check_available(device: torch.device | None = None, channels: int = 128) -> None:
    """Refuse a device that computes no FP8 attention for heads of so many channels, as far as is known untried.

    Args:
        device: None, or a CPU on which a model waits for its turn, is the current GPU.
        channels: of a head.

    Raises:
        UserError: what it needs.
    """
    if (device is None or device.type != "cuda") and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    reason = graphs.refusal(device or torch.device("cpu"), channels)
    if reason is not None:
        raise UserError(f"FP8 attention {reason}. Leave it off; simulate computes it slowly anywhere, for its numbers")


def head_channels(module: Any) -> int | None:
    """Return the channels of a head of an attention module; None where it does not say."""
    for name in ("to_q", "to_qkv"):
        width = getattr(getattr(module, name, None), "out_features", None)
        heads = getattr(module, "heads", None)
        if isinstance(width, int) and isinstance(heads, int) and heads:
            return width // heads // (3 if name == "to_qkv" else 1)
    return None
