"""Modules whose weights a move of the whole model (`model.to(device)`) must not touch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn


def stays(module: nn.Module, away: Callable[[], AbstractContextManager[None]]) -> Callable[[], None]:
    """Enclose every conversion of a module (`to`, `float`, `cuda`, also of a module around it) in a context.

    Weights that the context takes out are not converted.

    torch, diffusers and accelerate convert a module only by the method `_apply` of each submodule.

    Args:
        module: the module.
        away: returns the context, which takes out what stays where it is.

    Returns:
        A function that undoes this.
    """
    if "_apply" in vars(module):
        raise RuntimeError(f"the conversions of this {type(module).__name__} are already enclosed")
    convert: Callable[..., nn.Module] = module._apply

    def enclosed(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> nn.Module:
        with away():
            convert(fn, *args, **kwargs)
        return module

    vars(module)["_apply"] = enclosed

    def undo() -> None:
        del vars(module)["_apply"]

    return undo


def fixed(module: nn.Module) -> Callable[[], None]:
    """Make every conversion of a module do nothing; return a function that undoes this."""
    if "_apply" in vars(module):
        raise RuntimeError(f"the conversions of this {type(module).__name__} are already enclosed")
    vars(module)["_apply"] = lambda *_args, **_kwargs: module

    def undo() -> None:
        del vars(module)["_apply"]

    return undo
