"""Tensors of optimisers that consist of several plain tensors, taken apart and put together again.

torch calls such classes traceable wrapper subclasses; their methods `__tensor_flatten__` and `__tensor_unflatten__`
are torch's protocol for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_HOMES = {"OptimState8bit": "torchao.optim.subclass_8bit"}
"""Class of a state -> its module."""


def is_packed(value: Any) -> bool:
    """Return whether a value is a tensor of one of the known classes, which consists of several plain tensors."""
    return isinstance(value, Tensor) and type(value).__name__ in _HOMES


def taken_apart(value: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the plain tensors of a packed tensor by name, and JSON values from which `put_together` restores it."""
    names, context = value.__tensor_flatten__()
    told = [str(each) if isinstance(each, torch.dtype) else each for each in context]
    return {name: getattr(value, name) for name in names}, {"class": type(value).__name__, "context": told}


def put_together(parts: Mapping[str, Tensor], told: Mapping[str, Any]) -> Tensor:
    """Return the packed tensor that `taken_apart` took apart.

    Raises:
        KeyError: the class is unknown, or a part is missing.
        ImportError: the package of the class is not installed.
    """
    kind = getattr(import_module(_HOMES[told["class"]]), told["class"])
    context = [_dtype(each) if isinstance(each, str) else each for each in told["context"]]
    found: Tensor = kind.__tensor_unflatten__(dict(parts), context)
    return found


def _dtype(text: str) -> torch.dtype:
    found = getattr(torch, text.removeprefix("torch."))
    if not isinstance(found, torch.dtype):
        raise KeyError(text)
    return found
