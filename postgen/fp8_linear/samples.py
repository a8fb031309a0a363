"""Samples of weights, which reveal a change that torch's version counter does not record.

peft fuses LoRA through `weight.data`, which does not increase the version of the parameter. Adapters that are fused
and then unloaded between two forward passes leave no other trace. A fused LoRA changes the whole weight, so a few
numbers are enough to detect it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

NUMBERS = 64
"""How many numbers of each weight are sampled (about), spread over rows and columns."""

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sample_of(weight: Tensor) -> bytes:
    """Return the bits of a few numbers of a weight, at positions that depend on its shape only.

    The result is empty for the weights that `samples_of` leaves out.
    """
    return samples_of({"": weight}).get("", b"")


@torch.inference_mode(False)
@torch.no_grad()
def samples_of(weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the samples of several weights, by name.

    The function makes one copy to the CPU per device, dtype and sample size, and waits for it. It leaves out weights
    without memory of their own (meta or sharded tensors), weights that are not contiguous, and weights on a GPU while
    a CUDA graph is recorded.
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
    # The step is odd, so that the columns vary along with the rows.
    step = max(1, data.numel() // NUMBERS) | 1
    # Compare bits, because NaN is not equal to itself.
    return data.view(-1)[::step].view(_WHOLE[data.element_size()])
