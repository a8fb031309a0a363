"""The timestep argument of a call of a transformer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


def timestep_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the timestep that a transformer is called with: (B,), or with further axes for frames or tokens.

    Args:
        model: the transformer.
        args: positional arguments of the call, as a forward pre-hook receives them.
        kwargs: keyword arguments of the call.

    Raises:
        UserError: the call has no argument `timestep`.
    """
    kind: Any = type(model)
    known = _parameters(kind)
    place = known.index("timestep") if "timestep" in known else len(args)
    found: Tensor | None = kwargs.get("timestep", args[place] if place < len(args) else None)
    if found is None:
        raise UserError(f"{type(model).__name__} was called without a timestep, which its noise level is read from")
    return found


def timestep_per_row(timestep: Tensor) -> Tensor:
    """Return one timestep per row, (B,): the largest, because given frames and reference tokens have timestep 0."""
    return timestep.flatten(1).amax(1) if timestep.dim() > 1 else timestep.reshape(-1)


@functools.cache
def _parameters(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]
