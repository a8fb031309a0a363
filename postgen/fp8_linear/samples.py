"""A few numbers of a weight, to see that it changed where torch does not count it.

peft fuses LoRA into `weight.data`, whose writes leave the version of the parameter as it is; adapters that are fused
and unloaded between two calls leave no other trace. A fused LoRA changes the whole weight, so some numbers show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

NUMBERS = 64
"""Of each weight, spread over rows and columns."""

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sample_of(weight: Tensor) -> bytes:
    """Return the bits of some numbers of a weight; the same ones of each weight of its shape."""
    return samples_of({"": weight}).get("", b"")


@torch.inference_mode(False)
@torch.no_grad()
def samples_of(weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return `sample_of` of weights by their names: one copy from each device, which waits for it.

    Weights without memory of their own (meta, sharded) and those on a GPU whose CUDA graph is being recorded are left
    out.
    """
    alike: dict[tuple[torch.device, torch.dtype, int], dict[str, Tensor]] = {}
    for name, weight in weights.items():
        if (some := _some(weight)) is not None:
            alike.setdefault((some.device, some.dtype, len(some)), {})[name] = some
    found: dict[str, bytes] = {}
    for group in alike.values():
        rows = torch.stack([*group.values()]).cpu().numpy()
        found |= {name: row.tobytes() for name, row in zip(group, rows, strict=True)}
    return found


def _some(weight: Tensor) -> Tensor | None:
    data = weight.detach()
    if data.is_meta or type(data) is not torch.Tensor or not data.is_contiguous():
        return None
    if data.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    # An odd step, so that columns change along with rows.
    step = max(1, data.numel() // NUMBERS) | 1
    # By their bits: NaN is equal to nothing.
    return data.view(-1)[::step].view(_WHOLE[data.element_size()])
