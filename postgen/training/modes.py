"""Temporary eval mode of modules, and gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from postgen.compat import recomputes
from postgen.errors import UserError


def checkpoint_gradients(model: nn.Module) -> None:
    """Make a diffusers model recompute its activations in the backward pass.

    Raises:
        UserError: the model does not support it.
    """
    if not recomputes(model):
        raise UserError(
            f"gradient_checkpointing is true, but a {type(model).__name__} does not support it: set it to false"
        )
    model.enable_gradient_checkpointing()  # type: ignore[operator]


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules and their submodules into eval mode; on exit, restore the previous mode of each."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, training in modes:
            part.training = training
