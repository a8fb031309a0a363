"""A transformer that is exchanged in a pipeline after a plug-in was put on it: said once, as nothing else would."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from postgen.compat import unwrap
from postgen.families.attached import AttachedPlugIn
from postgen.families.installed import installed


def watch_replacements() -> None:
    """Let pipelines of diffusers warn when a transformer of theirs that carries plug-ins is exchanged for another.

    They go on as they are in everything else. It is never taken off; a second time changes nothing.
    """
    from diffusers import DiffusionPipeline

    kind: Any = DiffusionPipeline
    if not hasattr(kind.__setattr__, "postgen_unwatched"):
        kind.__setattr__ = _watched(kind.__setattr__)


def _watched(stock: Any) -> Any:
    @functools.wraps(stock)
    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name.startswith("transformer"):
            before = self.__dict__.get(name)
            stock(self, name, value)
            _tell_of(self, name, before, value)
        else:
            stock(self, name, value)

    __setattr__.postgen_unwatched = stock  # type: ignore[attr-defined]
    return __setattr__


def _tell_of(pipe: Any, name: str, before: Any, after: Any) -> None:
    """Warn where the new one lacks what is on the old one. A wrapper around the old one (compile, peft) has it."""
    from torch import nn

    if not (isinstance(before, nn.Module) and isinstance(after, nn.Module)):
        return
    on = {key for key, part in installed(before).plug_ins.items() if isinstance(part, AttachedPlugIn) and part.visible}
    lost = sorted(on - installed(unwrap(after)).plug_ins.keys())
    if lost:
        warnings.warn(
            f"{name} of {type(pipe).__name__} was replaced after {' and '.join(lost)} was applied: the new one runs"
            " without. Apply it again",
            stacklevel=3,
        )
