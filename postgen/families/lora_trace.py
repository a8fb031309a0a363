"""Find the tensors of a LoRA file that diffusers' own conversion would drop.

The conversions in `lora_state_dict` drop unknown keys with at most a log message. `left_out` runs a conversion on
stand-in tensors, once for each kind of tensor (down, up, alpha, ...): every tensor of this kind is filled with a
different number, all other tensors with ones. A number that is missing in the output belongs to a dropped tensor. This
works because a conversion multiplies tensors by alpha at most, and not by each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_DOWN = re.compile(r"(lora_A|lora_down|lora\.down|lora\d\.down)(\.default)?\.weight$")
_UP = re.compile(r"(lora_B|lora_up|lora\.up|lora\d\.up)(\.default)?\.weight$")


def left_out(convert: Callable[[dict[str, Tensor]], Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the keys of the tensors that a conversion drops.

    Args:
        convert: the conversion. It receives the tensors of a file by key, may change this dict, and returns a dict or
            a tuple that contains dicts.
        tensors: the tensors of the file by key.
    """
    kinds = {key: _kind(key) for key in tensors}
    lost = []
    for kind in dict.fromkeys(kinds.values()):
        tracked = [key for key in tensors if kinds[key] == kind]
        marks = {key: 2 + number for number, key in enumerate(tracked)}
        stand_ins = {key: _stand_in(key, tensor, marks.get(key), tensors) for key, tensor in tensors.items()}
        seen = set(_values(convert(stand_ins)))
        for key in tracked:
            value = marks[key] * (_rank(key, tensors) if kind == "alpha" else 1)
            if not seen & {marks[key], value}:
                lost.append(key)
    return lost


def _kind(key: str) -> str:
    if _DOWN.search(key):
        return "down"
    return "up" if _UP.search(key) else key.rpartition(".")[2]


def _rank(key: str, tensors: Mapping[str, Tensor]) -> int:
    """Return the rank of the layer that an alpha belongs to; 1 if the layer has no down matrix."""
    base = key.removesuffix(".alpha")
    return next((len(x) for other, x in tensors.items() if other.startswith(f"{base}.") and _DOWN.search(other)), 1)


def _stand_in(key: str, tensor: Tensor, mark: int | None, tensors: Mapping[str, Tensor]) -> Tensor:
    value = 1 if mark is None else mark
    # An alpha of `value` times the rank means a scale of `value`, which is 1 if the alphas are not tracked.
    value = value * _rank(key, tensors) if key.endswith(".alpha") else value
    return torch.full(tensor.shape, float(value))


def _values(out: Any) -> Iterator[float]:
    for each in out if isinstance(out, tuple) else (out,):
        for value in each.values() if isinstance(each, dict) else ():
            if isinstance(value, Tensor):
                # A matrix that a conversion assembles, such as a block-diagonal one, also contains zeros.
                yield from (float(x) for x in (value.amax(), value.flatten()[0])) if value.numel() else ()
            elif isinstance(value, int | float):
                yield float(value)
