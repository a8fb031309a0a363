"""Merge sets of tensors in blocks of values, with memory that depends neither on their size nor on their number."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.tensor_files import FLOATS, TensorRow, raw_bytes
from postgen.training.weighted import finite_sum, is_finite, working_dtype

from .methods import slerp_factors

_VALUES = 2**21
"""Number of values in memory at a time, over all sources: 8 MiB in float32."""


class Tensors(Protocol):
    """Named tensors that can be read in blocks of values; `postgen.tensor_files.TensorBlocks` is one."""

    rows: dict[str, TensorRow]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the values `start` to `stop` of a tensor in a row."""


class InMemory:
    """Tensors of a mapping, as the streaming merge reads them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        names = {getattr(torch, name): short for short, name in FLOATS.items()}
        self._flat = {
            name: value.detach().cpu().contiguous().flatten() if value.dtype in names else _bytes(value)
            for name, value in tensors.items()
        }
        self.rows = {
            name: TensorRow(
                names.get(value.dtype, str(value.dtype)), tuple(value.shape), value.numel() * value.itemsize
            )
            for name, value in tensors.items()
        }

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the values `start` to `stop` of a tensor in a row."""
        return self._flat[name][start:stop]


@dataclass(kw_only=True)
class Rule:
    """How sources become one: factors of the base (if there is one) and the sources, or slerp of two sources."""

    factors: list[float]
    """One factor for each reader; not used by slerp."""

    slerp: float | None = None
    """Position between the last two readers; None is the sum with `factors`."""

    dtype: str | None = None
    """Dtype of the result, by its name in safetensors files; None keeps that of the sources."""


@dataclass(kw_only=True)
class Measured:
    """What the merge measures while it reads: digests of the sources, and lengths and angles of their differences."""

    labels: list[str]
    """Name of each reader for messages, the base first if there is one."""

    has_base: bool

    squares: dict[tuple[str, int], float] = field(default_factory=dict)
    """Sums of squares of differences by kind and reader: `length` of the reader, `step` to the next source, `turn` the
    inner product of a step with the next one, `base` the distance from the base, `merged` the distance from the
    merge."""

    changes: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Tensor -> squared distance of the merge from the first reader, and squared length of the first reader."""

    values: int = 0
    """Number of merged values."""

    def __post_init__(self) -> None:
        """Prepare the digests: for each reader one per tensor."""
        self._hashes: list[Any] = []
        self._name = ""
        self._digests: list[dict[str, str]] = [{} for _ in self.labels]

    def add(self, name: str, values: Sequence[Tensor], merged: Tensor) -> None:
        """Add a block: the values of all readers and of the merge, in the dtype of the calculation."""
        first = 1 if self.has_base else 0
        sources = values[first:]
        steps = [late - early for early, late in itertools.pairwise(sources)]
        for number, value in enumerate(values):
            self._sum("length", number, value, value)
            self._sum("merged", number, change := merged - value, change)
            if self.has_base and number:
                self._sum("base", number, far := value - values[0], far)
            if not number:
                before = self.changes.get(name, (0.0, 0.0))
                self.changes[name] = (before[0] + _dot(change, change), before[1] + _dot(value, value))
        for number, step in enumerate(steps, first):
            self._sum("step", number, step, step)
        for number, (step, following) in enumerate(itertools.pairwise(steps), first):
            self._sum("turn", number, step, following)
        self.values += merged.numel()

    def begin(self, name: str, rows: Sequence[TensorRow]) -> None:
        """Begin the digests of a tensor, with its name, dtype and shape in each reader."""
        self._end()
        self._name = name
        self._hashes = [hashlib.sha256(f"{name} {row.dtype} {list(row.shape)}\n".encode()) for row in rows]

    def told(self, name: str, blocks: Sequence[Tensor]) -> None:
        """Add a block of each reader to the digests of a tensor, the last one that has begun."""
        assert name == self._name
        for each, block in zip(self._hashes, blocks, strict=True):
            each.update(raw_bytes(block))

    def digest(self, reader: int) -> str:
        """Return the digest of all tensors of a reader, which does not depend on their order."""
        self._end()
        every = (value for _, value in sorted(self._digests[reader].items()))
        return hashlib.sha256("\n".join(every).encode()).hexdigest()

    def _end(self) -> None:
        # The contexts of a hash are small objects of the C heap. If thousands of them stayed, each could lie in the
        # space of a freed block and spoil it for the next block, and the memory would grow with the model.
        for digests, each in zip(self._digests, self._hashes, strict=False):
            digests[self._name] = each.hexdigest()
        self._hashes = []

    def _sum(self, kind: str, number: int, first: Tensor, second: Tensor) -> None:
        self.squares[kind, number] = self.squares.get((kind, number), 0.0) + _dot(first, second)


def merged_blocks(
    name: str, readers: Sequence[Tensors], rule: Rule, measured: Measured, network: str = ""
) -> Iterator[Tensor]:
    """Yield the merge of one tensor in blocks, in the dtype of the result.

    Tensors of other dtypes than floating-point numbers must be equal in all sources, and are kept.

    Args:
        name: name of the tensor; all readers have it with one shape.
        readers: the base, if there is one, and the sources.
        rule: how they are merged.
        measured: digests and distances, to which this function adds.
        network: name of the network in `measured`, if there are several.

    Raises:
        UserError: a source holds NaN, sources differ in integers or infinite values, or the result overflows.
    """
    rows = [reader.rows[name] for reader in readers]
    key = f"{network}/{name}" if network else name
    measured.begin(key, rows)
    if not rows[0].is_float:
        yield from _equal_bytes(name, key, readers, measured)
        return
    factors = rule.factors if rule.slerp is None else _slerp(name, readers, rule.slerp, measured)
    result: torch.dtype = getattr(torch, FLOATS[rule.dtype or rows[-1].dtype])
    wide = working_dtype([getattr(torch, FLOATS[row.dtype]) for row in rows])
    for start, stop in _spans(rows[0].count, len(readers)):
        raw = [reader.read(name, start, stop) for reader in readers]
        measured.told(key, raw)
        values = [block.to(wide) for block in raw]
        merged = finite_sum(name, values, factors, measured.labels)
        out = merged.to(result)
        if merged is not values[0] and not is_finite(out):
            raise UserError(f"{name} overflows {result}: choose another dtype, or smaller weights")
        yield out
        # Infinite values, which are equal in all sources, have no distances.
        if is_finite(merged):
            measured.add(key, values, merged)


def merge_tensors(
    sources: Sequence[Mapping[str, Tensor]], rule: Rule, base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Merge tensors in memory, with the calculation of the streaming merge.

    Args:
        sources: tensors by name, the same names and shapes in each.
        rule: how they are merged; with a base its first factor is that of the base.
        base: tensors of the base.

    Raises:
        UserError: names or shapes differ, or `merged_blocks` refuses the values.
    """
    from .checks import check_rows

    all_sources = [*([base] if base is not None else []), *sources]
    labels = [*(["the base"] if base is not None else []), *(f"source {n}" for n in range(1, len(sources) + 1))]
    readers = [InMemory(tensors) for tensors in all_sources]
    check_rows([reader.rows for reader in readers], labels, any_dtype=rule.dtype is not None)
    measured = Measured(labels=labels, has_base=base is not None)
    merged = {}
    for name, value in all_sources[-1].items():
        parts = list(merged_blocks(name, readers, rule, measured))
        flat = torch.cat(parts) if parts else value.new_empty(0)
        merged[name] = flat.view(value.shape) if readers[-1].rows[name].is_float else value.clone()
    return merged


def _slerp(name: str, readers: Sequence[Tensors], t: float, measured: Measured) -> list[float]:
    """Return the factors of one tensor for slerp of the differences from the base, or of the sources themselves."""
    first = second = dot = 0.0
    for start, stop in _spans(readers[0].rows[name].count, len(readers)):
        values = [reader.read(name, start, stop).double() for reader in readers]
        one, two = values[-2:] if not measured.has_base else (value - values[0] for value in values[1:])
        first, second, dot = first + _dot(one, one), second + _dot(two, two), dot + _dot(one, two)
    low, high = slerp_factors(t, math.sqrt(first), math.sqrt(second), dot)
    return [1 - low - high, low, high] if measured.has_base else [low, high]


def _equal_bytes(name: str, key: str, readers: Sequence[Tensors], measured: Measured) -> Iterator[Tensor]:
    row = readers[0].rows[name]
    for start, stop in _spans(row.count, len(readers)):
        blocks = [reader.read(name, start, stop) for reader in readers]
        measured.told(key, blocks)
        for number, block in enumerate(blocks):
            if not torch.equal(block, blocks[0]):
                raise UserError(
                    f"{name} is {row.dtype} and differs between {measured.labels[0]} and {measured.labels[number]}:"
                    " only floating-point weights have a mean; merge exact models, not quantised ones"
                )
        yield blocks[0]


def _spans(count: int, readers: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the blocks of a tensor."""
    size = max(2**12, _VALUES // (readers + 3))
    return ((start, min(start + size, count)) for start in range(0, count, size))


def _dot(first: Tensor, second: Tensor) -> float:
    return float(torch.dot(first, second))


def _bytes(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8)
