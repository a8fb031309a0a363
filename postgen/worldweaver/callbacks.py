"""Check the callbacks of the pipeline and their return values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from postgen.errors import UserError, shown


def check_callbacks(said: Mapping[str, Any], known: Sequence[str]) -> None:
    """Check callbacks before generation starts.

    Args:
        said: arguments of `WorldWeaverPipeline.stream` by name.
        known: names of the tensors that a step callback can request.

    Raises:
        UserError: a callback is not callable, or a requested tensor is not known.
    """
    for name in ("callback_on_step_end", "callback_on_group_end"):
        if said[name] is not None and not callable(said[name]):
            raise UserError(f"{name} must be callable, got {shown(said[name])}")
    names = said["callback_on_step_end_tensor_inputs"]
    if not isinstance(names, list | tuple):
        raise UserError(f"callback_on_step_end_tensor_inputs must be a list of {', '.join(known)}, got {shown(names)}")
    if wrong := [name for name in names if name not in known]:
        raise UserError(
            f"callback_on_step_end_tensor_inputs has {shown(wrong[0])}: give only names from {', '.join(known)}"
        )


def latents_of(answer: Any) -> Tensor | None:
    """Return the latents from the return value of a step callback; None: the callback returned no latents.

    Raises:
        UserError: the callback returned neither None nor a mapping, or its latents are not a tensor.
    """
    if answer is None:
        return None
    found = answer.get("latents") if isinstance(answer, Mapping) else answer
    if not isinstance(answer, Mapping) or not (found is None or isinstance(found, Tensor)):
        raise UserError(f"callback_on_step_end must return None or a dict with latents, got {shown(answer)}")
    return found
