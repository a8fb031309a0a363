"""Choose a layer type for each block: the least sum of errors within a budget for the cost of a denoising step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from torch import nn

from postgen.errors import SettingError, UserError, check_number
from postgen.families.budget import knapsack
from postgen.lit.config import LitConfig
from postgen.lit.costs import UNITS, CostTable, model_number
from postgen.lit.options import TYPES
from postgen.lit.record import Record, read_record
from postgen.lit.score import Scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan(Record):
    """A layer type per block, with the errors and costs that decided it. `print` shows a table."""

    transformer: str
    """Class name of the transformer."""
    model: int
    """See `CostTable.model`."""
    device: str
    """See `CostTable.device`."""
    unit: str
    """See `CostTable.unit`."""
    shape: tuple[int, int, int]
    """See `CostTable.shape`."""
    types: tuple[str, ...]
    """Layer type of each block."""
    errors: tuple[float, ...]
    """Error of each block, from the scores; 0 for softmax."""
    costs: tuple[int, ...]
    """Change of the cost of a step by each block, in `unit`; negative if the block becomes cheaper."""
    base: int
    """Cost of a step with softmax in every block, in `unit`."""
    attention: float
    """Share of attention in the FLOPs of such a step, 0 to 1."""
    budget: float
    """The allowed cost of a step, as a share of `base`."""

    @property
    def share(self) -> float:
        """Expected cost of a step as a share of `base`."""
        return (self.base + sum(self.costs)) / self.base

    @property
    def ceiling(self) -> float:
        """Upper bound of the speed-up: 1 / (1 - attention x converted), as if the converted attention cost nothing."""
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
        config: LitConfig | None = None,
        *,
        shape: tuple[int, int, int] | None = None,
        device: str | None = None,
    ) -> LitConfig:
        """Return a `LitConfig` for `convert` with the layer types of this plan.

        Args:
            transformer: the transformer to convert.
            config: all other settings; None for the defaults.
            shape: num_frames, height and width for which the model will run. If given, the plan must be for this
                shape.
            device: the device on which the model will run, as `families.latency` names it. If given, a plan from
                measured costs must be for this device.

        Raises:
            UserError: the plan is for another model, shape or device.
        """
        if model_number(transformer) != self.model:
            raise UserError(
                f"this plan is for a {self.transformer} whose configuration differs from that of this"
                f" {type(transformer).__name__}: make a new plan"
            )
        if shape is not None and tuple(shape) != self.shape:
            raise UserError(
                f"this plan is for {self.shape} (frames, height, width), not {tuple(shape)}: make a new plan"
            )
        if device is not None and self.device and device != self.device:
            raise UserError(f"this plan was measured on {self.device}, not on {device}: make a new plan")
        return dataclasses.replace(config or LitConfig(), layers=self.types, first_block=self.types[0] != "softmax")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan from a file that `save` wrote.

        Raises:
            UserError: the file is not a plan, or it is damaged.
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
    """Choose the layer types with the least sum of errors among all choices within the budget. The result is exact.

    Args:
        scores: errors of the layer types.
        costs: costs of the layer types of the same model. Candidates are softmax and the types in both tables.
        budget: largest allowed cost of a step, as a share of a step with softmax in every block, above 0, up to 1.
        first_block: whether block 0 may be converted.

    Raises:
        UserError: scores and costs belong to different models or have no common type, a score is not finite, or no
            choice is within the budget.
    """
    kinds = [kind for kind in scores.errors if kind in costs.changes]
    blocks = {len(row) for row in (*scores.errors.values(), *costs.changes.values())}
    if scores.transformer != costs.transformer or len(blocks) != 1 or not kinds:
        raise UserError(
            f"scores of a {scores.transformer} ({', '.join(scores.errors)}) and costs of a {costs.transformer}"
            f" ({', '.join(costs.changes)}) do not belong together: compute both for one model and the same layer"
            " types"
        )
    for kind in kinds:
        for block, error in enumerate(scores.errors[kind]):
            if math.isfinite(error) or not (block or first_block):
                continue
            raise UserError(
                f"the score of {kind} in block {block} is {error}, but scores must be finite: leave this layer type"
                " out, or score in a dtype that does not overflow"
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
    """Refuse a budget that no choice of layer types can meet. Only costs are needed, so this can run before scoring.

    Args:
        costs: costs of the layer types.
        budget: see `plan`.
        kinds: candidate layer types besides softmax.
        first_block: whether block 0 may be converted.

    Raises:
        UserError: no choice is within the budget.
    """
    check_number("budget", budget, 1e-6, 1)
    of_blocks = list(zip(*(costs.changes[kind] for kind in kinds), strict=True))
    least = sum(min(0, *changes) for changes in (of_blocks if first_block else of_blocks[1:]))
    if costs.base + least > _most(costs, budget):
        # Rounded up, so that the printed number is a valid budget.
        share = math.ceil(10_000 * Fraction(costs.base + least, costs.base)) / 10_000
        size = " x ".join(map(str, costs.shape))
        if least == 0:
            raise SettingError(
                "budget",
                f" {budget:g} cannot be met with {', '.join(kinds)}: at {size} no block becomes cheaper. Use other"
                " layer types, or a longer or larger clip",
            )
        raise SettingError(
            "budget",
            f" {budget:g} cannot be met with {', '.join(kinds)}: the smallest possible budget is {share:.4f} at"
            f" {size}. Use a larger budget, other layer types, or a longer or larger clip",
        )


def _most(costs: CostTable, budget: float) -> int:
    """Return the largest allowed cost of a step.

    The budget is read by its decimal digits, because the float product 100 * 0.57 is less than 57.
    """
    return math.floor(costs.base * Fraction(str(budget)))
