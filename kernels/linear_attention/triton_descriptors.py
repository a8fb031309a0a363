"""Tensor descriptors for Hopper's copy engine (TMA), and the check of which tensors can have one.

Without a descriptor, every thread computes addresses and masks to load a tile. With a descriptor, one thread requests
the whole tile, and the copy engine writes it to shared memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from postgen.kernels.linear_attention.triton_launch import Launch, block_d, block_e

_BYTES = 16
"""Addresses and strides must be multiples of this number of bytes."""
_HOPPER = 9
"""Major compute capability of the GPUs on which launches use descriptors."""


def described(how: Launch, *tensors: Tensor) -> tuple[list[Any], Launch]:
    """Return the tensors of a pass, each (B, N, H, D), as descriptors, and the launch to use.

    A descriptor is (B, N, width); the width spans from the first channel of the first head to the last channel of the
    last head. Reads beyond the tokens of a sample give 0, and writes beyond them are dropped. If the launch uses no
    descriptors, or one of the tensors cannot have one, all tensors are returned unchanged, with the launch for tiles
    that threads load.
    """
    if not how.described or not all(_fits(each) for each in tensors):
        return list(tensors), how.by_threads
    return [_descriptor(each, how.tokens) for each in tensors], how


def _fits(x: Tensor) -> bool:
    batch, tokens, heads, channels = x.shape
    sample, token, head, channel = x.stride()
    steps = (token,) if batch == 1 else (token, sample)
    return (
        _has_engine(x)
        # A tile must hold all channels of its head, and no channel of the next head.
        and block_d(channels) == block_e(channels) == channels
        and channel == 1
        and 0 <= (heads - 1) * head <= token - channels
        and all(step * x.element_size() % _BYTES == 0 for step in steps)
        and (batch == 1 or (sample % token == 0 and sample >= tokens * token))
        and x.data_ptr() % _BYTES == 0
    )


def _has_engine(x: Tensor) -> bool:
    if triton.knobs.runtime.interpret:
        return True
    return torch.version.cuda is not None and torch.cuda.get_device_capability(x.device)[0] == _HOPPER


def _descriptor(x: Tensor, tile: int) -> TensorDescriptor:
    batch, tokens, heads, channels = x.shape
    sample, token, head, _ = x.stride()
    width = (heads - 1) * head + channels
    # With a single sample the sample stride is never used and may have any value, so set a valid one.
    strides = [tokens * token if batch == 1 else sample, token, 1]
    return TensorDescriptor(x, [batch, tokens, width], strides, [1, tile, channels])
