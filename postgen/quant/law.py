"""Scaling law of quantisation-aware training, and its fit to runs of your own (arXiv:2505.14302).

The loss that quantisation adds to a model of N parameters, trained on D tokens, with groups of G numbers per scale is

    delta = k D^d (log2 G)^g / N^n

    fit = fit_law([LawRun(parameters=2e6, tokens=1e8, group=64, delta=0.031), ...])
    print(fit)
    fit.predict(parameters=4e6, tokens=2e8, group=64)

delta is the difference of two losses on the same fixed list of validation points, with the same noise. The published
constants (`PUBLISHED`) are those of language models trained from scratch; they say nothing about the loss of a
diffusion model, so fit your own. A law holds for one format, one way of training and the measured ranges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from postgen.errors import UserError, check_number

VARIABLES = ("parameters", "tokens", "group")
"""Variables of a law, in the order of its exponents."""
FULL_GRID = {"parameters": 2, "tokens": 3, "group": 3}
"""Variable -> least number of different values that a fit should have."""
_HUBER = 1e-3
"""Log residuals above this count linearly (as in the paper), so single bad runs have little influence."""
_ROUNDS = 300
_LEAST_GROUP = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class LawRun:
    """A pair of runs, with and without quantisation.

    Raises:
        UserError: a number is out of range.
    """

    parameters: float
    """Number N of parameters."""
    tokens: float
    """Number D of tokens of the training."""
    group: float
    """Numbers G that share a scale; for a scale per row, the number of input channels. Above 2."""
    delta: float
    """Loss with quantisation minus loss without."""

    def __post_init__(self) -> None:
        for name in ("parameters", "tokens"):
            check_number(name, getattr(self, name), 1, 1e18)
        check_number("group", self.group, _LEAST_GROUP, 1e9)
        check_number("delta", self.delta, -1e9)


@dataclass(frozen=True, kw_only=True, slots=True)
class QatLaw:
    """delta = k D^tokens (log2 G)^group / N^parameters."""

    k: float
    parameters: float
    """Exponent n: larger models lose less."""
    tokens: float
    """Exponent d: longer training loses more."""
    group: float
    """Exponent g: larger groups lose more."""

    def delta(self, parameters: float, tokens: float, group: float) -> float:
        """Return the loss that quantisation adds."""
        log = self.tokens * math.log(tokens) - self.parameters * math.log(parameters)
        return self.k * math.exp(log + self.group * math.log(math.log2(group)))


PUBLISHED: Mapping[str, QatLaw] = {
    "W4A4": QatLaw(k=0.1582, parameters=0.2186, tokens=0.0745, group=0.7779),
    "W4A16": QatLaw(k=0.2522, parameters=0.3589, tokens=0.1610, group=0.3533),
    "W16A4": QatLaw(k=0.1004, parameters=0.1816, tokens=0.0331, group=0.9812),
    "W4A4, FC2 input 8 bit": QatLaw(k=0.3519, parameters=0.2637, tokens=0.0964, group=0.3407),
    "W16A4, FC2 input 8 bit": QatLaw(k=0.1273, parameters=0.2347, tokens=0.0827, group=0.4491),
}
"""Bits of weights and activations -> law of language models of 74 to 595 million parameters, trained from scratch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A number with the interval that holds the middle 90 % of its bootstrap values."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction(Estimate):
    """The predicted loss that quantisation adds."""

    outside: tuple[str, ...]
    """Variables whose value is outside the range of the runs: there the interval says too little."""


@dataclass(frozen=True, kw_only=True)
class LawFit:
    """A law that was fitted to runs. `print` shows it with its limits."""

    law: QatLaw
    intervals: Mapping[str, Estimate]
    """k and the exponents, with intervals over resamples of the runs."""
    unidentified: Mapping[str, str]
    """Variable -> why the runs do not determine its exponent, which is 0 then: its effect is part of other numbers."""
    runs: tuple[LawRun, ...]
    """The runs of the fit."""
    left_out: tuple[LawRun, ...]
    """Runs whose delta is not above 0: the law cannot represent them. Many of them bias the fit upwards."""
    fit_error: float
    """Mean of |predicted / measured - 1| over the runs."""
    leave_one_out: float
    """The same, each run predicted by a fit to the others: the honest error within the measured ranges."""
    warnings: tuple[str, ...]
    """What is missing for a reliable fit."""
    draws: Tensor
    """Bootstrap values of log k and the exponents, (draws, 4)."""

    def predict(self, *, parameters: float, tokens: float, group: float) -> Prediction:
        """Predict the loss that quantisation adds.

        Raises:
            UserError: a value is wrong, or the runs do not determine the loss at these values: a variable had another
                value in all runs, or varied only together with others.
        """
        asked = LawRun(parameters=parameters, tokens=tokens, group=group, delta=0)
        row, seen = _design([asked]), _design(self.runs)
        # Where the row is a sum of multiples of the rows of the runs, all laws that fit them predict the same.
        rest = row - row @ torch.linalg.pinv(seen, rtol=1e-9) @ seen
        if self.unidentified and float(rest.abs().max()) > 1e-6:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.unidentified.items())
            raise UserError(f"the runs do not determine the loss at these values ({why}): add runs with other values")
        outside = [name for name in VARIABLES if not _within(name, asked, self.runs)]
        found = (row @ self.draws.T)[0].exp()
        low, high = found.quantile(torch.tensor([0.05, 0.95], dtype=found.dtype)).tolist()
        value = self.law.delta(parameters, tokens, group)
        return Prediction(value=value, low=low, high=high, outside=tuple(outside))

    def error(self, runs: Sequence[LawRun]) -> float:
        """Return the mean of |predicted / measured - 1| over other runs, which were not used for the fit.

        Raises:
            UserError: there are no runs, or a measured delta is not above 0.
        """
        if not runs or any(run.delta <= 0 for run in runs):
            raise UserError("the error of a law needs runs with a delta above 0: leave the others out and say so")
        return _relative([self.law.delta(run.parameters, run.tokens, run.group) for run in runs], runs)

    def __str__(self) -> str:
        lines = [f"delta = k D^d (log2 G)^g / N^n, fitted to {len(self.runs)} runs"]
        for name, each in self.intervals.items():
            unknown = f"  not identified: {self.unidentified[name]}" if name in self.unidentified else ""
            lines.append(f"{name:12}{each.value:12.4g}  [{each.low:.4g}, {each.high:.4g}]{unknown}")
        lines.append(f"mean error {self.fit_error:.1%}; of runs that were not in the fit {self.leave_one_out:.1%}")
        ranges = ", ".join(
            f"{name} {min(values):g} to {max(values):g}"
            for name, values in ((name, [getattr(run, name) for run in self.runs]) for name in VARIABLES)
        )
        lines.append(f"holds for this format and training, and {ranges}")
        lines += [f"warning: {each}" for each in self.warnings]
        return "\n".join(lines)


def fit_law(runs: Sequence[LawRun], *, draws: int = 1000, seed: int = 0) -> LawFit:
    """Fit a law to runs.

    The logarithm of the law is linear in log k and the exponents. They minimise the Huber loss of the log residuals,
    with exponents of at least 0. This problem is convex and is solved exactly, by reweighted least squares on each
    face of the allowed region. (The paper uses L-BFGS from several starts.)

    Args:
        runs: at least as many runs with a delta above 0 as the law has identified numbers, and one more.
        draws: number of resamples of the runs for the intervals.
        seed: seed of the resamples.

    Raises:
        UserError: there are too few runs.
    """
    check_number("draws", draws, 10, 100_000, whole=True)
    kept = [run for run in runs if run.delta > 0]
    unidentified = _unidentified(kept)
    free = [0, *(1 + place for place, name in enumerate(VARIABLES) if name not in unidentified)]
    if len(kept) < len(free) + 1:
        raise UserError(
            f"a law with {len(free)} numbers needs at least {len(free) + 1} runs with a delta above 0, got {len(kept)}"
            f" of {len(runs)}: add runs"
        )
    design, target = _design(kept), torch.tensor([math.log(run.delta) for run in kept], dtype=torch.float64)
    count = len(kept)
    found = _fitted(design, target, torch.ones(1, count, dtype=torch.float64), free)[0]
    law = _law(found)
    others = _fitted(design, target, 1 - torch.eye(count, dtype=torch.float64), free)
    samples = _resampled(design, target, free, draws, seed)
    return LawFit(
        law=law,
        intervals=_intervals(law, samples),
        unidentified=unidentified,
        runs=tuple(kept),
        left_out=tuple(run for run in runs if run.delta <= 0),
        fit_error=_relative((design @ found).exp().tolist(), kept),
        leave_one_out=_relative((design * others).sum(1).exp().tolist(), kept),
        warnings=_warnings(kept, len(runs) - count),
        draws=samples,
    )


def _design(runs: Sequence[LawRun]) -> Tensor:
    """Return the columns of log k and of the exponents in the order of `VARIABLES`, (runs, 4)."""
    rows = [[1.0, -math.log(run.parameters), math.log(run.tokens), math.log(math.log2(run.group))] for run in runs]
    return torch.tensor(rows, dtype=torch.float64)


def _law(numbers: Tensor) -> QatLaw:
    log_k, *exponents = numbers.tolist()
    return QatLaw(k=math.exp(log_k), **dict(zip(VARIABLES, exponents, strict=True)))


def _unidentified(runs: Sequence[LawRun]) -> dict[str, str]:
    """Return the variables that depend on the constant and the variables before them, with the reasons."""
    found: dict[str, str] = {}
    design = _design(runs)
    design = design - design.mean(0)
    used: list[int] = []
    for place, name in enumerate(VARIABLES, 1):
        if len({getattr(run, name) for run in runs}) <= 1:
            found[name] = "it has one value in all runs"
        elif torch.linalg.matrix_rank(design[:, [*used, place]], rtol=1e-6) <= len(used):
            found[name] = f"it varies only together with {' and '.join(VARIABLES[each - 1] for each in used)}"
        else:
            used.append(place)
    return found


def _fitted(design: Tensor, target: Tensor, weights: Tensor, free: Sequence[int]) -> Tensor:
    """Return the numbers with the least weighted Huber loss, weights (B, runs) -> (B, 4); those not in `free` are 0.

    The minimum of a convex function over exponents of at least 0 is its free minimum on one of the faces where some of
    them are 0. So where the free minimum has a negative exponent, all faces are tried, and the best allowed minimum is
    kept.
    """
    best = torch.zeros(len(weights), design.shape[1], dtype=design.dtype)
    best[:, free], _ = _huber(design[:, free], target, weights)
    wrong = (best < 0)[:, 1:].any(1)
    if not wrong.any():
        return best
    least = torch.full((int(wrong.sum()),), math.inf, dtype=design.dtype)
    inside = torch.zeros(len(least), design.shape[1], dtype=design.dtype)
    for face in range(1, 2 ** (len(free) - 1)):
        columns = [0, *(each for bit, each in enumerate(free[1:]) if not face >> bit & 1)]
        found, loss = _huber(design[:, columns], target, weights[wrong])
        better = (found[:, 1:] >= 0).all(1) & (loss < least)
        whole = torch.zeros_like(inside)
        whole[:, columns] = found
        inside, least = torch.where(better[:, None], whole, inside), torch.where(better, loss, least)
    best[wrong] = inside
    return best


def _huber(design: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the free minimum of the Huber loss and its value, by reweighted least squares from ordinary ones."""
    middle = design.mean(0)
    middle[0] = 0.0
    centred = design - middle  # so that the normal equations are well conditioned
    now = weights
    for _ in range(_ROUNDS):
        scaled = centred.T * now[:, None, :]
        found = torch.linalg.solve(scaled @ centred, (scaled @ target)[..., None])[..., 0]
        residual = (target - found @ centred.T).abs()
        now = weights / residual.clamp_min(_HUBER)
    loss = torch.where(residual < _HUBER, residual.square() / (2 * _HUBER), residual - _HUBER / 2)
    found[:, 0] -= found @ middle
    return found, (weights * loss).sum(1)


def _resampled(design: Tensor, target: Tensor, free: Sequence[int], draws: int, seed: int) -> Tensor:
    """Return the fits to resamples of the runs, (draws, 4); resamples that do not determine the numbers are drawn
    again."""
    generator, count = torch.Generator().manual_seed(seed), len(design)
    columns = design[:, list(free)]
    columns = columns / columns.abs().amax(0)
    found: list[Tensor] = []
    while len(found) < draws:
        picked = torch.randint(count, (count,), generator=generator)
        if torch.linalg.matrix_rank(columns[picked], rtol=1e-6) == len(free):
            found.append(torch.bincount(picked, minlength=count).double())
    return _fitted(design, target, torch.stack(found), free)


def _intervals(law: QatLaw, samples: Tensor) -> dict[str, Estimate]:
    bounds = samples.quantile(torch.tensor([0.05, 0.95], dtype=samples.dtype), 0)
    low, high = bounds.tolist()
    low[0], high[0] = math.exp(low[0]), math.exp(high[0])
    values = [getattr(law, each.name) for each in fields(law)]
    names = [each.name for each in fields(law)]
    return {
        name: Estimate(value=value, low=a, high=b) for name, value, a, b in zip(names, values, low, high, strict=True)
    }


def _relative(predicted: Sequence[float], runs: Sequence[LawRun]) -> float:
    return sum(abs(each / run.delta - 1) for each, run in zip(predicted, runs, strict=True)) / len(runs)


def _within(name: str, run: LawRun, runs: Sequence[LawRun]) -> bool:
    values = [getattr(each, name) for each in runs]
    return bool(min(values) <= getattr(run, name) <= max(values))


def _warnings(runs: Sequence[LawRun], left_out: int) -> tuple[str, ...]:
    found = []
    if left_out:
        found.append(f"{left_out} runs with a delta of at most 0 were left out, which biases the law upwards")
    for name, least in FULL_GRID.items():
        values = len({getattr(run, name) for run in runs})
        if values < least:
            found.append(f"different values of {name}: {values}; a reliable fit has at least {least}")
    return tuple(found)
