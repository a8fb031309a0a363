"""Warn when a pipeline's transformer with plug-ins is replaced: without it, the plug-ins would disappear silently."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from postgen.compat import unwrap
from postgen.families.attached import AttachedPlugIn
from postgen.families.installed import installed


def watch_replacements() -> None:
    """Make diffusers pipelines warn when a transformer with plug-ins is replaced by one without them.

    The function wraps `DiffusionPipeline.__setattr__` and changes nothing else. The wrapper stays for the life of the
    process; further calls do nothing.
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
    """Warn if the new transformer lacks plug-ins of the old one. A wrapper (compile, peft) of the old one has them."""
    from torch import nn

    if not (isinstance(before, nn.Module) and isinstance(after, nn.Module)):
        return
    on = {key for key, part in installed(before).plug_ins.items() if isinstance(part, AttachedPlugIn) and part.visible}
    lost = sorted(on - installed(unwrap(after)).plug_ins.keys())
    if lost:
        warnings.warn(
            f"{name} of {type(pipe).__name__} was replaced after {' and '.join(lost)} was applied: the new one runs"
            " without it. Apply it again",
            stacklevel=3,
        )
