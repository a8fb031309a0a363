"""Choose a layer type for each block, so that a step costs at most a given share and the errors add up to least."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from torch import nn

from postgen.errors import UserError, check_number
from postgen.lit.config import LiTConfig
from postgen.lit.costs import UNITS, CostTable, model_number
from postgen.lit.options import TYPES
from postgen.lit.record import Record, read_record
from postgen.lit.score import Scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan(Record):
    """A layer type per block, what it was chosen for, and what it is expected to cost; `print` it."""

    transformer: str
    """Class name."""
    model: int
    """As of `CostTable`."""
    device: str
    """As of `CostTable`."""
    unit: str
    """As of `CostTable`."""
    shape: tuple[int, int, int]
    """As of `CostTable`."""
    types: tuple[str, ...]
    """Of each block."""
    errors: tuple[float, ...]
    """Of each block."""
    costs: tuple[int, ...]
    """What each block changes of `base`."""
    base: int
    """A step with softmax in every block."""
    attention: float
    """Share of it that attention has, in FLOPs."""
    budget: float
    """Share of `base` that was allowed."""

    @property
    def share(self) -> float:
        """Share of `base` that a step is expected to cost."""
        return (self.base + sum(self.costs)) / self.base

    @property
    def ceiling(self) -> float:
        """How much faster a step could be if the converted attention cost nothing: 1 / (1 - attention x converted)."""
        converted = sum(kind != "softmax" for kind in self.types) / len(self.types)
        return 1 / (1 - self.attention * converted)

    def __str__(self) -> str:
        where = f" on {self.device}" if self.device else ""
        size = " x ".join(map(str, self.shape))
        linear = sum(kind != "softmax" for kind in self.types)
        lines = [
            f"{self.transformer} at {size}{where}: {linear} of {len(self.types)} blocks converted, a step costs"
            f" {self.share:.3f} of softmax (budget {self.budget:g}), {1 / self.share:.2f}x; at most"
            f" {self.ceiling:.2f}x by attention's share {self.attention:.1%}",
            f"{'block':>5}  {'type':14}{'error':>9}{'saves':>16} {UNITS[self.unit]}",
        ]
        rows = zip(self.types, self.errors, self.costs, strict=True)
        lines += [f"{block:5}  {kind:14}{error:9.4f}{-cost:16,}" for block, (kind, error, cost) in enumerate(rows)]
        lines.append(f"{'sum':>5}  {'':14}{sum(self.errors):9.4f}{-sum(self.costs):16,}")
        return "\n".join(lines)

    def config(
        self,
        transformer: nn.Module,
        config: LiTConfig | None = None,
        *,
        shape: tuple[int, int, int] | None = None,
        device: str | None = None,
    ) -> LiTConfig:
        """Return settings for `convert`.

        Args:
            transformer: that the plan is for.
            config: everything but the layers; None is the defaults.
            shape: num_frames, height and width that it is to run at, to hold the plan to.
            device: that it is to run on, as `families.latency` names it, to hold the plan to.

        Raises:
            UserError: the plan is of another model, shape or device.
        """
        if model_number(transformer) != self.model:
            raise UserError(
                f"this plan is of a {self.transformer} with another configuration than this"
                f" {type(transformer).__name__}: make a new one"
            )
        if shape is not None and tuple(shape) != self.shape:
            raise UserError(
                f"this plan is for {self.shape} (frames, height, width), not {tuple(shape)}: make a new one"
            )
        if device is not None and self.device and device != self.device:
            raise UserError(f"this plan was measured on {self.device}, not on {device}: make a new one")
        return dataclasses.replace(config or LiTConfig(), layers=self.types, first_block=self.types[0] != "softmax")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            UserError: it is something else.
        """
        content = read_record(cls, path, "plan")
        try:
            if not {*content["types"]} <= {*TYPES}:
                raise ValueError("an unknown layer type")
            lists = {name: tuple(content[name]) for name in ("shape", "types", "errors", "costs")}
            return cls(**{**content, **lists})
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} holds a damaged plan ({error})") from error


def plan(scores: Scores, costs: CostTable, budget: float, *, first_block: bool = False) -> Plan:
    """Choose the types with the least sum of errors of all that keep to the budget, exactly.

    Args:
        scores: errors of the types.
        costs: of the same model; types that are in both are tried, and softmax.
        budget: the most that a step may cost, as a share of a step with softmax in every block.
        first_block: whether block 0 may be converted.

    Raises:
        UserError: scores and costs of different models, no common type, a score that is not finite, or a budget that
            no choice keeps to.
    """
    kinds = [kind for kind in scores.errors if kind in costs.changes]
    blocks = {len(row) for row in (*scores.errors.values(), *costs.changes.values())}
    if scores.transformer != costs.transformer or len(blocks) != 1 or not kinds:
        raise UserError(
            f"scores of a {scores.transformer} ({', '.join(scores.errors)}) and costs of a {costs.transformer}"
            f" ({', '.join(costs.changes)}) do not belong together: make both of one model and of the same types"
        )
    for kind in kinds:
        for block, error in enumerate(scores.errors[kind]):
            if math.isfinite(error) or not (block or first_block):
                continue
            raise UserError(
                f"the score of {kind} in block {block} is {error}, which cannot be compared:"
                " leave the type out, or score in a dtype in which it does not overflow"
            )
    choices = [[("softmax", 0.0, 0)] for _ in range(blocks.pop())]
    for block, choice in enumerate(choices):
        if block or first_block:
            choice += [(kind, scores.errors[kind][block], costs.changes[kind][block]) for kind in kinds]
    check_budget(costs, budget, kinds, first_block=first_block)
    allowed = _most(costs, budget) - costs.base
    chosen = knapsack([[(error, cost) for _, error, cost in choice] for choice in choices], allowed)
    taken = [choice[place] for choice, place in zip(choices, chosen, strict=True)]
    return Plan(
        transformer=costs.transformer,
        model=costs.model,
        device=costs.device,
        unit=costs.unit,
        shape=costs.shape,
        types=tuple(kind for kind, _, _ in taken),
        errors=tuple(error for _, error, _ in taken),
        costs=tuple(cost for _, _, cost in taken),
        base=costs.base,
        attention=costs.attention,
        budget=budget,
    )


def check_budget(costs: CostTable, budget: float, kinds: Sequence[str], *, first_block: bool = False) -> None:
    """Refuse a budget that no choice keeps to, which costs alone tell: before blocks are scored.

    Args:
        costs: as of `plan`.
        budget: as of `plan`.
        kinds: types that may be chosen, besides softmax.
        first_block: as of `plan`.

    Raises:
        UserError: it is such a budget.
    """
    check_number("budget", budget, 1e-6, 1)
    of_blocks = list(zip(*(costs.changes[kind] for kind in kinds), strict=True))
    least = sum(min(0, *changes) for changes in (of_blocks if first_block else of_blocks[1:]))
    if costs.base + least > _most(costs, budget):
        # Rounded up, so that it can be given as it stands.
        share = math.ceil(10_000 * Fraction(costs.base + least, costs.base)) / 10_000
        raise UserError(
            f"budget={budget:g} cannot be kept with {', '.join(kinds)}: the smallest possible is {share:.4f} at"
            f" {' x '.join(map(str, costs.shape))}: allow more, or give other types or a longer or larger clip"
        )


def _most(costs: CostTable, budget: float) -> int:
    """What a step may cost, by the digits of the budget: 100 * 0.57 is less than 57."""
    return math.floor(costs.base * Fraction(str(budget)))


def knapsack(choices: list[list[tuple[float, int]]], allowed: int) -> list[int]:
    """Return which choice to take of each list of (error, cost): least error with costs up to `allowed`, exactly.

    Kept are, block by block, the partial sums that no other one beats in both error and cost; costs are whole numbers,
    so they are at most as many as there are costs.
    """
    # What the blocks to come can save at most decides which partial sums can still keep to the budget.
    later = [0]
    for choice in reversed(choices):
        later.append(later[-1] + min(cost for _, cost in choice))
    front: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for choice, rest in zip(choices, later[-2::-1], strict=True):
        found = [
            (cost + more, error + added, (*taken, place))
            for cost, error, taken in front
            for place, (added, more) in enumerate(choice)
            if cost + more + rest <= allowed
        ]
        front, best = [], float("inf")
        for candidate in sorted(found, key=lambda each: each[:2]):
            if candidate[1] < best:
                front.append(candidate)
                best = candidate[1]
    return list(front[-1][2])
