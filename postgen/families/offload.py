"""Where the weights of a pipeline stand while it runs: all on the device, one component at a time, or one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError

if TYPE_CHECKING:
    import torch

OFFLOADS = ("none", "auto", "model", "sequential")
SHARE = 0.75
"""Of the free memory that weights may take where `auto` chooses: what a clip needs beside them depends on its size."""


def check_offload(offload: str, place: str) -> None:
    """Refuse to offload where there is nothing to offload from; `auto` then keeps everything where it is.

    Args:
        offload: one of `OFFLOADS`.
        place: device that the pipeline runs on, from `check_device`.

    Raises:
        UserError: parts were to go to a GPU and back, and none is used.
    """
    if offload not in ("none", "auto") and place == "cpu":
        raise UserError(f"--offload {offload} moves parts to a GPU and back, and there is none in use: leave it out")


def choose_offload(parts: Mapping[str, int], free: int) -> str:
    """Return the quickest of `none`, `model` and `sequential` whose weights fit.

    Args:
        parts: bytes of the weights by component.
        free: bytes of the device that nobody uses. Weights may take `SHARE` of them.

    >>> [choose_offload({"transformer": 28, "text_encoder": 11}, free) for free in (80, 40, 24)]
    ['none', 'model', 'sequential']
    """
    room = SHARE * free
    if sum(parts.values()) <= room:
        return "none"
    return "model" if max(parts.values()) <= room else "sequential"


def place_weights(pipe: Any, place: str, offload: str) -> None:
    """Bring a pipeline whose weights are in the memory of the machine to its device.

    Args:
        pipe: a diffusers pipeline.
        place: device, from `check_device`.
        offload: `model` keeps one component at a time there, `sequential` one layer at a time, `none` all of it;
            `auto` is `choose_offload` by what is free on a CUDA device, and `none` on others, whose memory is that of
            the machine.
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
