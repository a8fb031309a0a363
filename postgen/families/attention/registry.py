"""The attention readers of each transformer class, by class name. This module is light to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from postgen.errors import UserError
from postgen.families.fingerprints import known_for
from postgen.families.layout import found
from postgen.families.registry import known_layouts

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from postgen.families.attention.reading import AttentionCall, Reading


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionReader:
    """Functions that take a call of one processor class of diffusers apart and return its output."""

    bind: Callable[..., AttentionCall]
    """`bind(attention, *args, **kwargs)` returns the arguments of the processor by name."""
    read: Callable[[AttentionCall], Reading | None]
    """Projects the inputs and returns the parts of the call; None if the processor must compute the call. A reading
    holds the raw queries and keys: delete it before attention is computed, to save memory."""
    finish: Callable[[AttentionCall, Tensor, torch.dtype], Any]
    """`finish(call, out, dtype)` returns the output of the processor for the attention output `out`, (B, N, H, D) in
    the token order of the reading. `dtype` is the dtype of the queries in attention."""
    fingerprints: tuple[str, ...]
    """Fingerprints of the versions of the processor's `__call__` that these functions support."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionAnatomy:
    """The readers of the self-attention modules of one transformer class."""

    readers: Mapping[str, AttentionReader]
    """Readers by the class name of the processor."""

    def reader(
        self, processor: Any, *, what: str = "reading of the attention", advice: str = "set a processor of diffusers"
    ) -> AttentionReader:
        """Return the reader of a processor. For a wrapper of postgen, this is the reader of the wrapped processor.

        Args:
            processor: processor of a self-attention module.
            what: name of the result in the error message: "no {what} of ...".
            advice: what the user can do, for the error message.

        Raises:
            UserError: the class of the processor is unknown, or its source code has changed.
        """
        kind: Any = type(processor)
        kind = getattr(kind, "postgen_parent", kind)
        return known_for(kind, kind.__call__, self.readers, what=what, advice=advice)


_anatomies: dict[str, AttentionAnatomy] = {}
"""Anatomies from `register_attention`, by transformer class name; they take precedence over the layout rows."""


def register_attention(transformer: str, anatomy: AttentionAnatomy) -> None:
    """Register the anatomy of a transformer class by its name; it replaces the anatomy of the layout row."""
    _anatomies[transformer] = anatomy


def attention_of(transformer: nn.Module) -> AttentionAnatomy:
    """Return the anatomy of a transformer, which may be wrapped (DDP, compiled, peft) or of a subclass.

    Raises:
        UserError: neither the class nor one of its parents has an anatomy.
    """
    from postgen.compat import unwrap

    kind = type(unwrap(transformer))
    known = known_anatomies()
    for parent in kind.__mro__:
        if parent.__name__ in known:
            anatomy: AttentionAnatomy = found(known[parent.__name__])
            return anatomy
    raise UserError(
        f"the attention of {kind.__name__} cannot be read. Known: {', '.join(sorted(known))}."
        " To add one, pass its anatomy to postgen.families.attention.register_attention"
    )


def known_anatomies() -> dict[str, str | AttentionAnatomy]:
    """Return the anatomies by class name of the transformer, for the classes that have one.

    A value is an anatomy (from `register_attention`), or the place `module:NAME` from which `found` imports it.
    """
    rows = {row.transformer: row.attention for row in known_layouts()}
    return {name: place for name, place in rows.items() if place is not None} | _anatomies
