"""Placement of a pipeline's weights: all on the device, or one component or one layer at a time (offloading)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError

if TYPE_CHECKING:
    import torch

OFFLOADS = ("none", "auto", "model", "sequential")
SHARE = 0.75
"""Share of the free device memory that the weights may take when `auto` chooses.

The rest is for activations, which depend on the size of the clip.
"""


def check_offload(offload: str, place: str) -> None:
    """Refuse an offload mode that needs a GPU if the pipeline runs on the CPU.

    `none` and `auto` are always accepted: on the CPU, `auto` offloads nothing.

    Args:
        offload: one of `OFFLOADS`.
        place: device that the pipeline runs on, from `check_device`.

    Raises:
        UserError: `model` or `sequential` on the CPU.
    """
    if offload not in ("none", "auto") and place == "cpu":
        raise UserError(
            f"--offload {offload} moves components to a GPU and back, but the pipeline runs on the CPU: leave it out"
        )


def choose_offload(parts: Mapping[str, int], free: int) -> str:
    """Return the fastest of the modes `none`, `model` and `sequential` whose weights fit on the device.

    Args:
        parts: bytes of the weights, by name of the component.
        free: free bytes on the device. The weights may take the share `SHARE` of them.

    >>> [choose_offload({"transformer": 28, "text_encoder": 11}, free) for free in (80, 40, 24)]
    ['none', 'model', 'sequential']
    """
    room = SHARE * free
    if sum(parts.values()) <= room:
        return "none"
    return "model" if max(parts.values()) <= room else "sequential"


def place_weights(pipe: Any, place: str, offload: str) -> None:
    """Move a pipeline whose weights are in main memory to its device.

    Args:
        pipe: a diffusers pipeline.
        place: device, from `check_device`.
        offload: `none` keeps all weights on the device, `model` one component at a time, `sequential` one layer at a
            time. `auto` calls `choose_offload` with the free memory of a CUDA device. On other devices, which share
            main memory, `auto` is `none`.
    """
    if offload == "auto":
        offload = choose_offload(_bytes(pipe), _free(place)) if place.startswith("cuda") else "none"
    if offload == "model":
        pipe.enable_model_cpu_offload(device=place)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=place)
    else:
        pipe.to(place)


def _bytes(pipe: Any) -> dict[str, int]:
    import torch

    found = {}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            found[name] = sum(_size(tensor) for tensor in (*part.parameters(), *part.buffers()))
    return found or {"nothing": 0}


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _free(place: str) -> int:
    import torch

    return torch.cuda.mem_get_info(torch.device(place))[0]
