"""What a merge did: sources with digests and weights, distances, and angles between successive changes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import postgen
from postgen.errors import UserError
from postgen.training.curves import curve_of

from .methods import MergeConfig
from .stream import Measured

NAME = "merge.json"
"""File name of the report in a merged folder; beside a merged file NAME.safetensors it is NAME.merge.json."""

Progress = Callable[[int, int], None]
"""Called with the percentage of the work that is done, and 100."""

_SHOWN = 5
"""Number of tensors with the largest changes in the report."""


@dataclass(frozen=True, kw_only=True)
class MergedSource:
    """One source in a report. Distances are Euclidean, over all floating-point values."""

    path: str
    digest: str
    """SHA-256 of names, dtypes, shapes and values of the tensors, which does not depend on the split into files; for a
    LoRA file of its bytes."""
    step: int | None = None
    """Optimiser step of a checkpoint."""
    weight: float | None = None
    """Factor of the source in the merge; None for slerp, whose factors differ between tensors."""
    length: float | None = None
    """Length of the source."""
    to_merged: float | None = None
    """Distance from the merge."""
    to_base: float | None = None
    """Distance from the base."""
    to_next: float | None = None
    """Distance from the next source."""
    cosine: float | None = None
    """Cosine of the change from this source to the next and the change that follows. Near 1: the weights still move in
    one direction, which a mean of many checkpoints slows down. At most 0: they oscillate, which a mean removes."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did."""

    output: str
    kind: str
    """What was merged: folder, file, checkpoint or lora."""
    settings: Mapping[str, Any]
    """The given settings."""
    sources: Sequence[MergedSource]
    base: MergedSource | None = None
    mean_cosine: float | None = None
    """Mean of the cosines of successive changes; None for fewer than three sources."""
    curve: Sequence[float] | None = None
    """For an average: multipliers of the learning rate that it emulates, one for each change between two sources."""
    tensors: int = 0
    values: int = 0
    """Number of merged floating-point values."""
    relative_change: float | None = None
    """Distance of the merge from the base, or else from the first source, divided by the length of that model; for a
    LoRA, of the changes that it makes."""
    largest_changes: Mapping[str, float] = field(default_factory=dict)
    """Tensors with the largest relative changes."""
    lora: Mapping[str, Any] = field(default_factory=dict)
    """Report about the LoRA of each network."""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"postgen": postgen.__version__, **asdict(self)}

    def to_json(self) -> str:
        """Return the report as a JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def rows(self) -> list[tuple[str, ...]]:
        """Return a table of the sources as texts, the titles first. Paths are without the folder that they share."""
        titles = ("source", "step", "weight", "to merge", "to base", "to next", "cosine")
        every = [*([self.base] if self.base else []), *self.sources]
        names = _short([each.path for each in every])
        rows = [
            (
                f"{name} (base)" if each is self.base else name,
                "" if each.step is None else str(each.step),
                *(
                    "" if value is None else f"{value:.4g}"
                    for value in (each.weight, each.to_merged, each.to_base, each.to_next, each.cosine)
                ),
            )
            for name, each in zip(names, every, strict=True)
        ]
        filled = [column for column in range(len(titles)) if column < 1 or any(row[column] for row in rows)]
        return [tuple(row[column] for column in filled) for row in (titles, *rows)]


def _short(paths: Sequence[str]) -> list[str]:
    """Return paths without their common folders, so that they fit into a line."""
    places = [Path(path).absolute() for path in paths]
    same = os.path.commonpath([place.parent for place in places])
    return [str(place.relative_to(same)) for place in places]


def settings_of(config: MergeConfig) -> dict[str, Any]:
    """Return the settings that were given, as JSON values."""
    return {name: value for name, value in asdict(config).items() if value is not None}


def emulated(factors: Sequence[float]) -> list[float] | None:
    """Return the multipliers that factors emulate; None if they are no average of several sources."""
    try:
        return curve_of(factors) or None
    except UserError:
        return None


def measured_sources(
    measured: Measured, steps: Sequence[int | None], factors: Sequence[float | None]
) -> list[MergedSource]:
    """Return the rows of the report from what a streaming merge measured.

    Args:
        measured: the measurements.
        steps: step of each reader, the base first if there is one.
        factors: factor of each reader.
    """

    def root(kind: str, number: int) -> float | None:
        square = measured.squares.get((kind, number))
        return None if square is None else math.sqrt(max(square, 0.0))

    rows = []
    for number, label in enumerate(measured.labels):
        near, far, turn = root("step", number), root("step", number + 1), measured.squares.get(("turn", number))
        cosine = turn / (near * far) if turn is not None and near and far else None
        rows.append(
            MergedSource(
                path=label,
                digest=measured.digest(number),
                step=steps[number],
                weight=factors[number],
                length=root("length", number),
                to_merged=root("merged", number),
                to_base=root("base", number),
                to_next=near,
                cosine=None if cosine is None else max(-1.0, min(1.0, cosine)),
            )
        )
    return rows


def change_of(measured: Measured) -> tuple[float | None, dict[str, float]]:
    """Return the relative change of all tensors together, and of those tensors that change most."""
    changed = math.fsum(change for change, _ in measured.changes.values())
    length = math.fsum(length for _, length in measured.changes.values())
    each = {name: math.sqrt(change / size) for name, (change, size) in measured.changes.items() if size > 0}
    largest = sorted(each.items(), key=lambda pair: -pair[1])[:_SHOWN]
    return (math.sqrt(changed / length) if length else None), {name: value for name, value in largest if value}


def mean_cosine(sources: Sequence[MergedSource]) -> float | None:
    """Return the mean of the cosines of successive changes; None if there are none."""
    found = [source.cosine for source in sources if source.cosine is not None]
    return math.fsum(found) / len(found) if found else None
