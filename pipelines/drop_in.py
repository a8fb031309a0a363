"""What every drop-in pipeline has in common: diffusers' own call with keyword arguments of ours."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from postgen.enhance import EnhanceAVideoConfig, enhance_for_call

EnhanceSetting = EnhanceAVideoConfig | float | str | None
"""None leaves Enhance-A-Video as it is, 0 or False is off, "auto" or True is the model's recommended weight, a number
is the weight, a config is taken as it is."""

_DOCUMENTATION = """

        enhance_a_video (`float`, `str` or [`postgen.EnhanceAVideoConfig`], *optional*):
            Enhance-A-Video for this call: a weight, "auto" or a config is on, 0 or False is off, None leaves it as it
            is. Afterwards it is as it was before, also after an error.
"""


class DropIn:
    """First parent of a drop-in pipeline; the second one is the class of diffusers that it stands for.

    The pair has the diffusers class' name, its whole call and `enhance_a_video=`. A folder that it saves names the
    diffusers class, so it loads without postgen.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if DropIn in cls.__bases__:
            (parent,) = (base for base in cls.__bases__ if base is not DropIn)
            cls.__call__ = _with_settings(parent.__call__)  # type: ignore[method-assign]

    if TYPE_CHECKING:  # at run time every class has its parent's signature and the keyword

        def __call__(self, *args: Any, enhance_a_video: EnhanceSetting = None, **kwargs: Any) -> Any:
            """Run the pipeline, with Enhance-A-Video set for this call. Every other argument is that of diffusers."""


def _with_settings(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a pipeline's `__call__` with our keyword arguments, which `inspect.signature` shows too."""

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, enhance_a_video: EnhanceSetting = None, **kwargs: Any) -> Any:
        with enhance_for_call(self, enhance_a_video):
            return call(self, *args, **kwargs)

    signature = inspect.signature(call)
    ours = inspect.signature(__call__, follow_wrapped=False).parameters["enhance_a_video"]
    theirs = list(signature.parameters.values())
    at_end = [one for one in theirs if one.kind is one.VAR_KEYWORD]
    theirs = [one for one in theirs if one.kind is not one.VAR_KEYWORD]
    __call__.__signature__ = signature.replace(parameters=[*theirs, ours, *at_end])  # type: ignore[attr-defined]
    __call__.__doc__ = (call.__doc__ or "").rstrip() + _DOCUMENTATION
    return __call__
