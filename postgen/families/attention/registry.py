"""Find what is known of the attention of a transformer, by class name. Light to import."""

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
    """Reads the calls of one processor class of diffusers, and gives back what it returns."""

    bind: Callable[..., AttentionCall]
    """`bind(attention, *args, **kwargs)`: the processor's arguments by name."""
    read: Callable[[AttentionCall], Reading | None]
    """Project, and say what is to be done; None for a call that must be left to the processor. It holds the raw
    queries and keys: drop it before attention is computed."""
    finish: Callable[[AttentionCall, Tensor, torch.dtype], Any]
    """`finish(call, out, dtype)`: what the processor returns for the attention `out`, (B, N, H, D) in the order of the
    tokens of the reading, with the dtype of the queries that attention read."""
    fingerprints: tuple[str, ...]
    """Of the texts of the processor's `__call__` that this was written for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionAnatomy:
    """What is known of the self-attention modules of one transformer class."""

    readers: Mapping[str, AttentionReader]
    """By the name of the processor's class."""

    def reader(
        self, processor: Any, *, what: str = "reading of the attention", advice: str = "set a processor of diffusers"
    ) -> AttentionReader:
        """Return the reader of a processor; one that a wrapper of ours stands on is looked through.

        Args:
            processor: of a self-attention module.
            what: what is made of the reading, for the error.
            advice: what to do instead, for the error.

        Raises:
            UserError: the class is not known, or its text is another one than the reader was written for.
        """
        kind: Any = type(processor)
        kind = getattr(kind, "postgen_parent", kind)
        return known_for(kind, kind.__call__, self.readers, what=what, advice=advice)


_anatomies: dict[str, AttentionAnatomy] = {}
"""What was registered beside the rows, by transformer class."""


def register_attention(transformer: str, anatomy: AttentionAnatomy) -> None:
    """Add the anatomy of the transformer class of this name, or replace that of its row."""
    _anatomies[transformer] = anatomy


def attention_of(transformer: nn.Module) -> AttentionAnatomy:
    """Return what is known of a transformer's attention; it may be wrapped (DDP, compiled, peft) or of a subclass.

    Raises:
        UserError: nothing is known of the class.
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
    """Return what is known, or where it is, by transformer class."""
    rows = {row.transformer: row.attention for row in known_layouts()}
    return {name: place for name, place in rows.items() if place is not None} | _anatomies
