"""Where a per-channel scale and shift can be folded into the weights of a repeated block, for each class of blocks.

A fold replaces a tensor x inside a block by (x - shift) / scale: the writers of x produce the new tensor, and its
readers compute with it what they computed before. A row names one such tensor. `postgen.quant.transforms.let` does the
arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from postgen.errors import UserError

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["norm", "value", "query_key", "gated"]
"""What the tensor is: the output of a (modulated) norm; the values of attention; its queries (divided by the scale)
and keys (multiplied by it); the half of a gated feed-forward network that has no activation."""

EmbeddingShape = Literal["slots", "slots_first", "flat"]
"""Shape of the timestep embedding that a block receives: (..., slots, C); (B, slots, ..., C); (..., slots * C)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Modulation by a table of the block plus an embedding that all blocks share:

        x = norm(h) (1 + table[scale] + embedding[scale]) + table[shift] + embedding[shift]

    The embedding cannot be folded, so the block multiplies it by a gain of its own (`postgen.quant.transforms.gains`).
    """

    shift: int
    """Slot of the shift."""
    scale: int
    """Slot of the scale."""
    name: str = "scale_shift_table"
    """Parameter of the block, (slots, C) or (1, slots, C)."""
    embedding: str = "temb"
    """Argument of the block's `forward` with the embedding."""
    shape: EmbeddingShape = "slots"


@dataclass(frozen=True, kw_only=True, slots=True)
class Modulation:
    """Modulation by a linear layer of the block, whose output has chunks of C channels:

    x = norm(h) (1 + chunk[scale]) + chunk[shift]
    """

    linear: str
    """Name of the linear layer inside the block."""
    chunks: int
    """Number of chunks."""
    scale: int
    shift: int | None
    """Chunk of the shift; None: there is none, so x can be scaled only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """A norm with a weight and perhaps a bias."""

    name: str
    inverse: bool = False
    """The tensor is multiplied by the scale instead of divided (keys)."""
    instead: str = ""
    """Linear layer that writes the tensor in blocks without this norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """Rows of a linear layer."""

    linear: str
    part: tuple[int, int] = (0, 1)
    """(i, n): the i-th of n equal parts of the rows."""
    shifts: bool = True
    """Whether the shift is subtracted here. A sum of several writers subtracts it once."""


Writer = Table | Modulation | Norm | Projection


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """A linear layer whose input contains the tensor in its first C channels."""

    linear: str
    first: bool = False
    """True: the input has further channels after those C; False: the tensor is the whole input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """One tensor of a block that can be scaled and shifted per channel.

    Writers and readers that a block does not have (its config decides) are skipped; without any writer, or without any
    reader where the row has some, the block has no such tensor.
    """

    name: str
    """Name of the tensor inside the block, for instance "attn1.input"."""
    kind: Kind
    writers: tuple[Writer, ...]
    readers: tuple[Reader, ...] = ()
    shift: bool = True
    """Whether a shift is possible at all."""
    paired: bool = False
    """Whether rotary embeddings turn the channels 2i and 2i + 1 together, so that both need one scale."""
    when: tuple[str, object] = ("", None)
    """(attribute, value) that the block must have; the attribute may be that of a module, "attn1.rope_type"."""
    present: str = ""
    """A module that the block must have."""
    absent: str = ""
    """A module that the block must not have."""


def has_folds(module: nn.Module) -> bool:
    """Whether there are rows for the class of a module."""
    rows = _rows()
    return any(kind.__name__ in rows for kind in type(module).__mro__)


def folds_of(block: nn.Module) -> tuple[Fold, ...]:
    """Return the rows of a block: its tensors that can be scaled and shifted per channel.

    Raises:
        UserError: there are no rows for the class of the block.
    """
    rows = _rows()
    for kind in type(block).__mro__:
        if kind.__name__ in rows:
            return rows[kind.__name__]
    raise UserError(
        f"no folds are known for blocks of the class {type(block).__name__}: use a recipe without equivalent"
        f" transformations (for instance rtn, gptq or block_ap). Known: {', '.join(sorted(rows))}"
    )


def register_folds(block: str, folds: tuple[Fold, ...]) -> None:
    """Add or replace the rows of a class of blocks.

    Args:
        block: name of the class.
        folds: its rows.
    """
    _added[block] = folds


_added: dict[str, tuple[Fold, ...]] = {}


def _rows() -> Mapping[str, tuple[Fold, ...]]:
    from postgen.families.folds_rows import ROWS

    return {**ROWS, **_added}
