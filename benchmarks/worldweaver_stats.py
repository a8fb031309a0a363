"""Statistics of arms over scenes and training seeds: means, differences and ratios with 95 % intervals.

Rows are paired by scene. An interval is a percentile bootstrap that resamples scenes (the same for both arms) and the
training seeds of each arm. For an arm with a single training seed it resamples scenes only, which `seeds` shows. Three
seeds are few values to resample, so the mean of every seed is reported beside the interval.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.worldweaver_along import rounded
from postgen.errors import UserError
from postgen.metrics.drift.start_end import SHARE, slope

DRAWS = 2000
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Runs:
    """All training seeds of an arm."""

    name: str
    files: Mapping[str, Mapping[str, Any]]
    """Seed number -> file of the seed; "0" if a file has no seed."""

    @property
    def first(self) -> Mapping[str, Any]:
        """The file of the first seed."""
        return next(iter(self.files.values()))

    def values(self, number: str) -> Tensor:
        """Return a number for every seed and scene, (S, N), NaN where missing."""
        known = latents_given(self.first["settings"], self.first["rows"][0])
        rows = [[value_of(row, number, known) for row in file["rows"]] for file in self.files.values()]
        return torch.tensor(rows, dtype=torch.float64)

    def line(self, name: str) -> Tensor:
        """Return a line over time for every seed and scene, (S, N, T), NaN where missing."""
        rows = [[_line(row, name) for row in file["rows"]] for file in self.files.values()]
        if any(line is None for each in rows for line in each):
            return torch.empty(len(rows), len(rows[0]), 0)
        return torch.tensor(
            [[[math.nan if v is None else v for v in line or ()] for line in each] for each in rows],
            dtype=torch.float64,
        )


def read_runs(folder: Path) -> dict[str, Runs]:
    """Read the arms of a folder, with their seeds.

    Raises:
        UserError: no arm, a damaged file, or files with different settings or numbers of clips.
    """
    found: dict[str, dict[str, Any]] = {}
    for place in sorted(folder.glob("*.json")):
        name, _, seed = place.stem.partition(".")
        try:
            file = json.loads(place.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{place} is damaged: delete it and measure that arm again") from error
        if "rows" in file and "settings" in file:
            found.setdefault(name, {})[seed or "0"] = file
    files = [file for arm in found.values() for file in arm.values()]
    if not files:
        raise UserError(f"{folder} has no arms: run benchmarks.worldweaver with --out {folder} first")
    if any(file["settings"] != files[0]["settings"] for file in files):
        raise UserError(f"arms in {folder} were measured with different settings: use one folder for each setting")
    counts = {len(file["rows"]) for file in files}
    if len(counts) > 1 or 0 in counts:
        raise UserError(f"arms in {folder} have {sorted(counts)} clips: measure the same number of clips for each arm")
    return {name: Runs(name, arm) for name, arm in found.items()}


def latents_given(settings: Mapping[str, Any], row: Row) -> int:
    """Return the number of latent frames that an arm was given."""
    latents = len(row["latent_error"]["rgb"])
    return (settings["given"] - 1) * (latents - 1) // max(1, settings["frames"] - 1) + 1


def value_of(row: Row, number: str, known: int = 0) -> float:
    """Return a number of a row by its path, NaN if it is missing.

    Additional paths beside those of `DriftReport.to_dict` are `latent.MODALITY.slope` (per 100 latent frames, from the
    first generated one on), `latent.MODALITY.last` (mean over the last 15 %), and `X.excess_size` (absolute value of
    `X.excess`).

    Args:
        row: row of a clip.
        number: path of the number.
        known: number of given latent frames.
    """
    if number.startswith("latent."):
        _, modality, what = number.split(".")
        line = torch.tensor(row["latent_error"].get(modality, [])[known:], dtype=torch.float64)
        if len(line) < 2:
            return math.nan
        return 100 * slope(line) if what == "slope" else float(line[-max(1, int(SHARE * len(line))) :].mean())
    path = number.removesuffix("_size").split(".")
    found = functools.reduce(lambda part, key: None if part is None else part.get(key), path, row)
    value = math.nan if found is None else float(found)  # type: ignore[arg-type]
    return abs(value) if number.endswith("_size") else value


def _line(row: Row, name: str) -> Sequence[float | None] | None:
    if name in ("rgb", "latent depth"):
        line: Sequence[float] | None = row["latent_error"].get(name.removeprefix("latent "))
        return line
    told: Sequence[float | None] | None = row["along"].get(name)
    return told


def interval(a: Tensor, b: Tensor | None = None, *, ratio: bool = False, seed: int = 0) -> dict[str, float] | None:
    """Return the mean of `a`, of `a - b`, or the ratio of the means of `a` and `b`, with its interval.

    Args:
        a, b: (S, N) and (S', N), NaN where a number is missing; such scenes are ignored in both.
        ratio: return the ratio of means instead of the difference.
        seed: seed of the bootstrap.

    Returns:
        value, low, high. None for fewer than two scenes, and for a ratio of means that are not above 0.
    """
    known = a.isfinite().all(0) if b is None else a.isfinite().all(0) & b.isfinite().all(0)
    if int(known.sum()) < 2:
        return None
    a, count = a[:, known], int(known.sum())
    generator = torch.Generator().manual_seed(seed)
    worlds = torch.randint(count, (DRAWS, count), generator=generator)
    means, value = _drawn(a, worlds, generator), a.mean()
    if b is not None:
        b = b[:, known]
        others = _drawn(b, worlds, generator)
        if ratio and not (b.mean() > 0 and (others > 0).all()):
            return None
        means, value = (means / others, value / b.mean()) if ratio else (means - others, value - b.mean())
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    found: dict[str, float] = rounded({"value": float(value), "low": low, "high": high})
    return found


def _drawn(a: Tensor, worlds: Tensor, generator: torch.Generator) -> Tensor:
    """Return the means of resampled seeds and scenes, (draws,)."""
    seeds = torch.randint(len(a), (DRAWS, len(a)), generator=generator)
    shares = torch.zeros(DRAWS, len(a), dtype=a.dtype).scatter_add_(
        1, seeds, torch.full(seeds.shape, 1 / len(a), dtype=a.dtype)
    )
    return (shares @ a).gather(1, worlds).mean(1)


def pooled(runs: Runs, number: str) -> dict[str, Any] | None:
    """Return the mean of a number with its interval, the number of scenes that have it, and the mean of each seed."""
    values = runs.values(number)
    found = interval(values)
    if found is None:
        return None
    known = values.isfinite().all(0)
    return {**found, "worlds": int(known.sum()), "by_seed": rounded(values[:, known].mean(1).tolist())}


def compared(a: Runs, b: Runs, number: str) -> dict[str, Any] | None:
    """Return the difference and the ratio of the means of a number between two arms."""
    left, right = a.values(number), b.values(number)
    difference = interval(left, right)
    if difference is None:
        return None
    seeds = [len(a.files), len(b.files)]
    return {"difference": difference, "ratio": interval(left, right, ratio=True), "seeds": seeds}


def bands(runs: Runs, name: str) -> list[dict[str, float] | None]:
    """Return a line over time: means over scenes of the means over seeds, plus and minus 1.96 standard errors."""
    line = runs.line(name).nanmean(0)
    found: list[dict[str, float] | None] = []
    for column in line.unbind(1) if line.dim() == 2 else ():
        known = column[column.isfinite()]
        if len(known) < 2:
            found.append(None)
            continue
        mean, wide = float(known.mean()), 1.96 * float(known.std()) / math.sqrt(len(known))
        found.append({"value": mean, "low": mean - wide, "high": mean + wide})
    return found
