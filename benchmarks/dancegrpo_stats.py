"""Statistics of measured runs: intervals over training seeds and prompts, guards, and the cost of a score.

An interval is a percentile bootstrap with 10,000 draws. A draw takes training seeds of each arm with replacement, and
prompts with replacement. The prompts are the same for all arms and for the base model, so differences are paired.
Three seeds are few values to draw from, so each number also has the value of every seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.dancegrpo_arms import ARMS, complete
from benchmarks.dancegrpo_measure import BASE, LEAST_MOTION, read_file
from postgen.errors import UserError
from postgen.grpo.guards import HackingGuard
from postgen.metrics.bootstrap import Interval
from postgen.world.spec import BACKGROUNDS

DRAWS = 10_000
File = Mapping[str, Any]
Draw = Callable[[Tensor], Tensor]
"""Values (S, N) of the seeds and prompts of an arm -> their mean in each draw, (draws,)."""


class Bootstrap:
    """Draws of prompts that all arms share, and draws of the seeds of each arm.

    Args:
        prompts: number of prompts.
        seed: seed of the draws.
        draws: number of draws.
    """

    def __init__(self, prompts: int, seed: int = 0, draws: int = DRAWS) -> None:
        self.seed, self.draws = seed, draws
        generator = torch.Generator().manual_seed(seed)
        self.prompts = _shares(draws, prompts, generator)

    def of(self, name: str) -> Draw:
        """Return the function from the values of the arm `name` to their means; every arm has its own seeds."""
        seeds: dict[int, Tensor] = {}

        def drawn(values: Tensor) -> Tensor:
            count, known = len(values), values.isfinite().all(0)
            if count not in seeds:
                generator = torch.Generator().manual_seed(self.seed + 1 + sum(name.encode()))
                seeds[count] = _shares(self.draws, count, generator)
            sums = (self.prompts @ values.T.nan_to_num(0.0).where(known[:, None], 0.0) * seeds[count]).sum(1)
            return sums if bool(known.all()) else sums / self.prompts[:, known].sum(1)

        return drawn


def _shares(draws: int, count: int, generator: torch.Generator) -> Tensor:
    """Return the share of each of `count` items in draws with replacement, (draws, count)."""
    picked = torch.randint(count, (draws, count), generator=generator)
    ones = torch.full(picked.shape, 1 / count, dtype=torch.float64)
    return torch.zeros(draws, count, dtype=torch.float64).scatter_add_(1, picked, ones)


def interval(value: float, draws: Tensor) -> dict[str, float]:
    """Return a number with the middle 95 % of its draws; NaN if it is not known."""
    draws = draws[draws.isfinite()]  # a draw may hold only prompts that lack the measure
    if not math.isfinite(value) or not len(draws):
        return {"value": math.nan, "low": math.nan, "high": math.nan}
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return asdict(Interval(value=_short(value), low=_short(low), high=_short(high)))


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def read_runs(out: Path) -> tuple[dict[str, Any], dict[str, dict[int, File]]]:
    """Return the file of the base model, and the complete files by arm and seed.

    Raises:
        UserError: the base model is not measured, or files were measured with different settings.
    """
    place = out / "measured" / f"{BASE}.json"
    if not complete(place):
        raise UserError(f"{out} has no measurement of the base model: run 'train' and 'measure' with this --out first")
    base = read_file(place, _settings(place))
    found: dict[str, dict[int, File]] = {name: {} for name in ARMS}
    for path in sorted((out / "measured").glob("*.*.json")):
        arm, _, seed = path.stem.rpartition(".")
        if arm in found and complete(path):
            found[arm][int(seed)] = read_file(path, base["settings"])
    return base, {name: dict(sorted(files.items())) for name, files in found.items() if files}


def _settings(place: Path) -> Mapping[str, Any]:
    settings: Mapping[str, Any] = json.loads(place.read_text(encoding="utf-8"))["settings"]
    return settings


def column(point: File, group: str, name: str) -> list[float]:
    """Return a measure of the clips of a group, NaN where it is missing."""
    values = point[group][name]
    if isinstance(values, str):
        return [float(letter) for letter in values]
    return [math.nan if value is None else float(value) for value in values]


def stacked(points: Sequence[File], group: str, name: str) -> Tensor:
    """Return a measure of several seeds, (S, N), float64."""
    return torch.tensor([column(point, group, name) for point in points], dtype=torch.float64)


def points_of(files: Mapping[int, File], base: File, which: str) -> list[File]:
    """Return the measures of each seed at `chosen`, `last`, or a checkpoint."""
    found = []
    for file in files.values():
        name = str(file[which]) if which in ("chosen", "last") else which
        found.append(base["points"][BASE] if name == BASE else file["points"][name])
    return found


def change(name: str, ours: Tensor, theirs: Tensor, boot: Bootstrap, other: str = BASE) -> dict[str, Any]:
    """Return mean, difference from `theirs` with interval, and the mean of each seed; (S, N) and (S', N)."""
    ours, theirs = paired(ours, theirs)
    mean, before = boot.of(name)(ours), boot.of(other)(theirs)
    return {
        "mean": interval(_mean(ours), mean),
        "before": _short(_mean(theirs)),
        "change": interval(_mean(ours) - _mean(theirs), mean - before),
        "by_seed": _by_seed(ours.nanmean(1)),
    }


def ratio(name: str, ours: Tensor, theirs: Tensor, boot: Bootstrap, other: str = BASE) -> dict[str, Any]:
    """Return the geometric mean of the ratios of paired clips with its interval, and that of each seed."""
    ours, theirs = (part.clamp_min(LEAST_MOTION).log() for part in paired(ours, theirs))
    draws = boot.of(name)(ours) - boot.of(other)(theirs)
    by_seed = (ours.nanmean(1) - _mean(theirs)).exp()
    return {**interval(math.exp(_mean(ours) - _mean(theirs)), draws.exp()), "by_seed": _by_seed(by_seed)}


def gap_closed(name: str, ours: Tensor, theirs: Tensor, boot: Bootstrap) -> dict[str, Any]:
    """Return (final - base) / (1 - base) with its interval, and that of each seed."""
    before = theirs.mean()
    if before >= 1:
        raise UserError("the base model is right on all test prompts: no gap is left to close")
    base = boot.of(BASE)(theirs).clamp_max(1 - 1e-6)
    draws = (boot.of(name)(ours) - base) / (1 - base)
    by_seed = ((ours.mean(1) - before) / (1 - before)).tolist()
    return {
        **interval(float((ours.mean() - before) / (1 - before)), draws),
        "by_seed": [_short(each) for each in by_seed],
    }


def floor_ratio(name: str, ours: Tensor, theirs: Tensor, boot: Bootstrap) -> dict[str, Any]:
    """Return the ratio of the effective numbers of floor colours over prompts, exp(entropy), with its interval."""

    def effective(shares: Sequence[Tensor]) -> Tensor:
        stack = torch.stack([*shares])
        return (-torch.special.xlogy(stack, stack)).sum(0).exp()

    kinds = range(len(BACKGROUNDS))
    mine, base = ([(part == kind).double() for kind in kinds] for part in (ours, theirs))
    before = effective([part.mean() for part in base])
    draws = effective([boot.of(name)(part) for part in mine]) / effective([boot.of(BASE)(part) for part in base])
    by_seed = effective([part.mean(1) for part in mine]) / before
    # The shares are joined over seeds, so a value above those of all seeds is possible: each seed has its own colour.
    value = effective([part.mean() for part in mine]) / before
    return {**interval(float(value), draws), "by_seed": [_short(each) for each in by_seed.tolist()]}


def mean_ratio(name: str, ours: Tensor, theirs: Tensor, boot: Bootstrap) -> dict[str, Any]:
    """Return the ratio of means with its interval, and that of each seed."""
    ours, theirs = paired(ours, theirs)
    draws = boot.of(name)(ours) / boot.of(BASE)(theirs)
    by_seed = _by_seed(ours.nanmean(1) / _mean(theirs))
    return {**interval(_mean(ours) / _mean(theirs), draws), "by_seed": by_seed}


def paired(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Replace prompts that lack a measure in any seed by NaN in both arms, so that both miss the same prompts."""
    known = ours.isfinite().all(0) & theirs.isfinite().all(0)
    return ours.where(known, math.nan), theirs.where(known, math.nan)


def _mean(values: Tensor) -> float:
    return float(values.nanmean())


def _by_seed(values: Tensor) -> list[float]:
    return [_short(value) for value in values.tolist()]


def cost_to(rows: Sequence[tuple[float, float]], score: float) -> float | None:
    """Return the cost at which a curve of (cost, score) first reaches `score`, interpolated; None if it never does."""
    before: tuple[float, float] | None = None
    for cost, value in rows:
        if value >= score:
            if before is None or value == before[1]:
                return cost
            return before[0] + (cost - before[0]) * (score - before[1]) / (value - before[1])
        before = cost, value
    return None


# Reward hacking.

LIMITS = {
    "motion": (0.85, 1.15),
    "sharp": (0.8, 1.25),
    "diversity": (0.8, math.inf),
    "loss": (0.0, 1.1),
    "norm": (0.95, 1.05),
}
"""Ratio to the base model outside which a guard fires."""
GUARDS = ("patience", "gold_falls", *LIMITS, "bright")
"""`patience`: the guard of the trainer (`HackingGuard`); `gold_falls`: the score of the exact judge is below its best
by more than chance; `bright`: the mean brightness moved by more than 0.05."""
BRIGHT = 0.05


def trained_reward(point: File, arm: str) -> Tensor:
    """Return the sum of the trained rewards of each test clip, (N,)."""
    return torch.stack([torch.tensor(column(point, "test", name)) for name in ARMS[arm].reward]).nan_to_num().sum(0)


def ratios_of(point: File, base: File) -> dict[str, float]:
    """Return the ratios of one checkpoint to the base model that the guards look at."""
    places = {"motion": "test", "sharp": "test", "diversity": "many", "loss": "clean", "norm": "clean"}
    found = {}
    for name, group in places.items():
        ours, theirs = (torch.tensor(column(each, group, name)) for each in (point, base))
        if name == "motion":
            found[name] = float((ours.clamp_min(LEAST_MOTION) / theirs.clamp_min(LEAST_MOTION)).log().mean().exp())
        else:
            found[name] = float(ours.mean() / theirs.mean())
    return found


def fired(arm: str, file: File, base: File) -> dict[str, float | None]:
    """Return the step of the first checkpoint at which each guard fires, None if it never does, and `parted`.

    `parted` is the first step at which the trained reward is above that of the base model and the score of the exact
    judge below it, both by more than chance over prompts.
    """
    start = base["points"][BASE]
    guard, best = HackingGuard(patience=2), torch.tensor(column(start, "test", "world"))
    guard.see(float(trained_reward(start, arm).mean()), float(best.mean()))
    found: dict[str, float | None] = dict.fromkeys(("parted", *GUARDS))

    def mark(name: str, now: bool) -> None:
        if now and found[name] is None:
            found[name] = point["step"]

    for name in sorted(each for each in file["points"] if each.isdigit()):
        point = file["points"][name]
        reward, gold = trained_reward(point, arm), torch.tensor(column(point, "test", "world"))
        first = torch.tensor(column(start, "test", "world"))
        mark("parted", surely(reward - trained_reward(start, arm)) and surely(first - gold))
        mark("patience", guard.see(float(reward.mean()), float(gold.mean())))
        mark("gold_falls", surely(best - gold))
        best = gold if gold.mean() > best.mean() else best
        for key, value in ratios_of(point, start).items():
            mark(key, not LIMITS[key][0] <= value <= LIMITS[key][1])
        moved = [sum(column(each, "test", "bright")) / len(gold) for each in (point, start)]
        mark("bright", abs(moved[0] - moved[1]) > BRIGHT)
    return found


def surely(differences: Tensor) -> bool:
    """Return whether the mean of differences (N,) is above 0 by more than 1.96 standard errors."""
    return bool(differences.mean() > 1.96 * differences.std() / math.sqrt(len(differences)))
