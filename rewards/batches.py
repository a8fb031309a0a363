"""The batch that rewards receive: split into micro-batches that fit into memory, with a store for what rewards log."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from postgen.errors import UserError
from postgen.rewards.base import GIVEN, Clip, Reward

Rows = list[int]
"""Indices of clips in a batch."""

RESERVED = GIVEN | {"must_score"}
"""Names that a column must not have, because the runner or its caller passes arguments of these names."""


@dataclass(slots=True)
class Batch:
    """N clips with their prompts and columns.

    Raises:
        UserError: a value has the wrong number of rows, or a clip is not of the form (F,3,H,W).
    """

    prompts: list[str | None]
    completions: Sequence[Clip]
    fps: float | Sequence[float | None] | None
    latents: Tensor | None
    trainer_state: Any
    columns: Mapping[str, Sequence[Any]]

    def __post_init__(self) -> None:
        count = len(self.completions)
        sized: dict[str, Any] = {"prompts": self.prompts, **self.columns}
        sized |= {"latents": self.latents} if self.latents is not None else {}
        sized |= {"fps": self.fps} if isinstance(self.fps, Sequence) else {}
        for name, values in sized.items():
            if not hasattr(values, "__len__") or isinstance(values, str) or len(values) != count:
                got = len(values) if hasattr(values, "__len__") and not isinstance(values, str) else repr(values)
                raise UserError(f"{name} must have one value for each of the {count} clips, got {got}")
        for clip in self.completions:
            if clip.ndim != 4 or clip.shape[1] != 3 or not clip.is_floating_point():
                raise UserError(
                    f"rewards need clips (F,3,H,W) of floats in [0,1], not {tuple(clip.shape)} {clip.dtype}"
                )

    def __len__(self) -> int:
        return len(self.completions)

    def unprompted(self, reward: Reward) -> Rows:
        """Return the rows that a reward cannot score because they have neither a prompt nor a replacement for it."""
        rows = [row for row, prompt in enumerate(self.prompts) if prompt is None]
        return [r for r in rows if reward.lacks_prompt(None, {n: values[r] for n, values in self.columns.items()})]

    def fps_of(self, row: int) -> float | None:
        """Return the frames per second of one clip."""
        return self.fps[row] if isinstance(self.fps, Sequence) else self.fps

    def rows(self, rows: Rows) -> dict[str, Any]:
        """Return the arguments of a reward function for the given rows, which must share one frame rate."""
        return {
            **{name: [values[row] for row in rows] for name, values in self.columns.items()},
            "prompts": [self.prompts[row] or "" for row in rows],
            "completions": [self.completions[row] for row in rows],
            "fps": self.fps_of(rows[0]),
            "latents": None if self.latents is None else self.latents[rows],
            "trainer_state": self.trainer_state,
        }


def micro_batches(batch: Batch, most_bytes: int, groupwise: bool, left_out: Rows) -> list[Rows]:
    """Split a batch into micro-batches of one frame rate and at most `most_bytes` bytes of clips (4 per value).

    A micro-batch has at least one clip. A groupwise reward receives all rows of one prompt in one micro-batch,
    whatever their size. Rows in `left_out` are skipped.
    """
    groups: dict[Any, Rows] = {}
    for row in sorted({*range(len(batch))} - {*left_out}):
        key = (batch.fps_of(row), batch.prompts[row] if groupwise else None)
        groups.setdefault(key, []).append(row)
    if groupwise:
        return list(groups.values())
    pieces: list[Rows] = []
    for rows in groups.values():
        room = 0
        for row in rows:
            size = 4 * batch.completions[row].numel()
            if room < size or row == rows[0]:
                pieces.append([])
                room = most_bytes
            pieces[-1].append(row)
            room -= size
    return pieces


class Notes:
    """Collect the calls `log_extra(column, values)`, `log_metric(name, value)` and `log_reasons(texts)` of rewards.

    The values of all micro-batches are joined.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.extra: dict[str, list[Any]] = {}
        self.reasons: dict[str, list[str | None]] = {}
        self._sums: dict[str, tuple[float, int]] = {}

    def loggers(self, rows: Rows, reward: str) -> dict[str, Callable[..., None]]:
        """Return `log_extra`, `log_metric` and `log_reasons`, by name, for one call of a reward with these rows."""

        def log_reasons(texts: Sequence[str | None]) -> None:
            if len(texts) != len(rows):
                raise ValueError(f"log_reasons got {len(texts)} texts for {len(rows)} clips")
            place = self.reasons.setdefault(reward, [None] * self.count)
            for row, text in zip(rows, texts, strict=True):
                place[row] = place[row] if text is None else " ".join(str(text).split())

        def log_extra(column: str, values: Sequence[Any]) -> None:
            if len(values) != len(rows):
                raise ValueError(f"log_extra({column!r}) got {len(values)} values for {len(rows)} clips")
            place = self.extra.setdefault(column, [None] * self.count)
            for row, value in zip(rows, values, strict=True):
                place[row] = value

        def log_metric(name: str, value: float) -> None:
            number = float(value)
            if math.isfinite(number):
                total, weight = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + number * len(rows), weight + len(rows)

        return {"log_extra": log_extra, "log_metric": log_metric, "log_reasons": log_reasons}

    def metrics(self) -> dict[str, float]:
        """Return the mean of each metric over the calls that logged a finite value, weighted by their clips."""
        return {name: total / weight for name, (total, weight) in self._sums.items()}
