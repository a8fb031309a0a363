"""Which tensors of a LoRA file would diffusers' own conversion leave out?

The conversions of `lora_state_dict` drop what they do not know with a notice at most. Here one is run on stand-ins:
every layer's tensors of one kind hold a number of their own and all others ones, so that what comes out tells what
has gone in. No conversion multiplies two of them but by alpha.
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
    """Return the keys of which nothing comes out of a conversion.

    Args:
        convert: takes the tensors of a file, which it may change; returns a dict, or a tuple with dicts in it.
        tensors: of the file.
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
    """Return the rank of the layer that an alpha belongs to."""
    base = key.removesuffix(".alpha")
    return next((len(x) for other, x in tensors.items() if other.startswith(f"{base}.") and _DOWN.search(other)), 1)


def _stand_in(key: str, tensor: Tensor, mark: int | None, tensors: Mapping[str, Tensor]) -> Tensor:
    value = 1 if mark is None else mark
    # An alpha of the rank scales by 1.
    value = value * _rank(key, tensors) if key.endswith(".alpha") else value
    return torch.full(tensor.shape, float(value))


def _values(out: Any) -> Iterator[float]:
    for each in out if isinstance(out, tuple) else (out,):
        for value in each.values() if isinstance(each, dict) else ():
            if isinstance(value, Tensor):
                # A matrix that a conversion made up has zeros.
                yield from (float(x) for x in (value.amax(), value.flatten()[0])) if value.numel() else ()
            elif isinstance(value, int | float):
                yield float(value)
