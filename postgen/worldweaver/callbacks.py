"""Callbacks of the pipeline: what they are asked to be, and what they return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from postgen.errors import UserError, shown


def check_callbacks(said: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse callbacks that cannot be called, before anything is made.

    Args:
        said: arguments of `WorldWeaverPipeline.stream` by name.
        known: names of tensors that a callback can have.

    Raises:
        UserError: one that is not callable, or a name of no tensor.
    """
    for name in ("callback_on_step_end", "callback_on_group_end"):
        if said[name] is not None and not callable(said[name]):
            raise UserError(f"{name} must be callable, got {shown(said[name])}")
    names = said["callback_on_step_end_tensor_inputs"]
    if not isinstance(names, list | tuple):
        raise UserError(f"callback_on_step_end_tensor_inputs must be some of {', '.join(known)}, got {shown(names)}")
    if wrong := [name for name in names if name not in known]:
        raise UserError(f"callback_on_step_end_tensor_inputs: {shown(wrong[0])} is none of {', '.join(known)}")


def latents_of(answer: Any) -> Tensor | None:
    """Return the latents that a callback wants, if it does.

    Raises:
        UserError: it returned something else than None or a mapping, or latents that are no tensor.
    """
    if answer is None:
        return None
    found = answer.get("latents") if isinstance(answer, Mapping) else answer
    if not isinstance(answer, Mapping) or not (found is None or isinstance(found, Tensor)):
        raise UserError(f"callback_on_step_end returns None or a dict with latents, got {shown(answer)}")
    return found
