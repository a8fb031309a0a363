"""Tiles that Hopper's copy engine moves whole: which tensors it takes, and their descriptors.

A tile that threads load goes through addresses and masks of every thread; one that is described by a tensor map is
asked for by one thread and arrives in shared memory by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from postgen.kernels.linear_attention.triton_launch import Launch, block_d, block_e

_BYTES = 16
"""What addresses and strides must be multiples of."""
_HOPPER = 9
"""Major compute capability of the GPUs whose launches ask for descriptors."""


def described(how: Launch, *tensors: Tensor) -> tuple[list[Any], Launch]:
    """Return a pass's tensors, (B, N, H, D), as descriptors, all of them or none, and the launch that goes with it.

    A descriptor is (B, N, from the first channel of the first head to the last of the last), so that what a tile has
    beyond the tokens of a sample is read as 0 and not written. Where the launch asks for none, or one of the tensors
    cannot be described, they stay what they are.
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
        # A tile has all channels of its head, and none of the next one's.
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
    # The step of a single sample may be any number, and is never taken.
    strides = [tokens * token if batch == 1 else sample, token, 1]
    return TensorDescriptor(x, [batch, tokens, width], strides, [1, tile, channels])
