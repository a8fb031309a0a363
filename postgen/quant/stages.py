"""Recipes as data: in which passes over the blocks of a model the quantised weights are found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from postgen.errors import UserError, did_you_mean, shown
from postgen.quant.fake import Ranges
from postgen.reconstruct.loss import Loss

Lets = Literal["none", "learned", "channel"]
"""Equivalent transformations: none, scales and shifts that are trained, or those that give the channels of a tensor
one common range (second stage of SOS, arXiv:2311.10126)."""

COMPUTED = frozenset({"let_scale", "let_shift", "scale", "zero"})
"""Parameters whose first values are computed; they are trained with `Stage.learning_rate_new`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A pass over the blocks in which each block is trained, or its layers are solved."""

    trains: frozenset[str] = frozenset()
    """Parameters of `FakeQuantLinear` and `Let` that are trained; empty: the codes come from `solver`."""
    solver: str = ""
    """Name of a solver that uses second moments of the inputs, for stages without training."""
    ranges: Ranges = "minmax"
    """Scales of the weights."""
    lets: Lets = "none"
    by_channel: bool = False
    """Whether the outputs of norms are quantised with a fixed scale and zero point for each channel."""
    exact_weights: bool = False
    """Whether weights stay exact in this pass."""
    aug: float = 0.0
    """Weight of a second term of the loss: the distance to the exact block's output for the same (quantised) input."""
    steps: int = 1000
    """Optimiser steps of each block."""
    batch: int = 1
    """Records per step."""
    learning_rate: float = 1e-4
    """For weights, and for the clips of LWC."""
    learning_rate_new: float = 1e-4
    """For scales, zero points and transformations."""
    schedule: Literal["constant", "cosine"] = "constant"
    loss: Loss = "relative_l2"
    """Each point counts relative to its own output, so no noise level dominates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A row of `RECIPES`."""

    summary: str
    """One line for documentation."""
    solver: str = "rtn"
    """Solver of recipes without stages; it needs no data."""
    stages: tuple[Stage, ...] = ()
    """Passes over the blocks, which need calibration."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the solver, also of that of a stage."""
    statistics: bool = False
    """Whether training also fits means and variances of activations, and layers are corrected to them at the end
    (FDDA)."""

    @property
    def calibrated(self) -> bool:
        """Whether the recipe needs calibration."""
        return bool(self.stages) or self.statistics


_LWC, _LET = frozenset({"clip_high", "clip_low"}), frozenset({"let_scale", "let_shift"})

RECIPES: Mapping[str, Recipe] = {
    "rtn": Recipe(summary="Rounding to nearest. No data."),
    "ls": Recipe(
        summary="Scales and zero points by least squares (DVD-Quant, arXiv:2505.18663). No data.", solver="ls"
    ),
    "gptq": Recipe(
        summary="Errors of rounded columns are compensated by later ones (arXiv:2210.17323).",
        stages=(Stage(solver="gptq"),),
    ),
    "bpdq": Recipe(
        summary="Bit planes with free coefficients (arXiv:2602.04163); weights in bp2, bp3 or bp4.",
        stages=(Stage(solver="bpdq"),),
    ),
    "omniquant": Recipe(
        summary="Learned clips of weights, and learned scales and shifts of inputs (arXiv:2308.13137).",
        stages=(
            Stage(
                trains=_LWC | _LET,
                ranges="lwc",
                lets="learned",
                aug=1.0,
                steps=1280,
                learning_rate=1e-2,
                learning_rate_new=5e-3,
            ),
        ),
    ),
    "sos": Recipe(
        summary="Weights are trained with inputs quantised per channel, then with quantised weights"
        " (I&S-ViT, arXiv:2311.10126).",
        stages=(
            Stage(
                trains=frozenset({"weight"}),
                by_channel=True,
                exact_weights=True,
                steps=1000,
                batch=4,
                learning_rate=4e-5,
                schedule="cosine",
            ),
            Stage(
                trains=frozenset({"weight"}),
                ranges="lsq",
                lets="channel",
                steps=1000,
                batch=4,
                learning_rate=4e-5,
                schedule="cosine",
            ),
        ),
    ),
    "block_ap": Recipe(
        summary="Weights, scales and zero points of a block are trained together (EfficientQAT, arXiv:2407.11062).",
        stages=(
            Stage(
                trains=frozenset({"weight", "scale", "zero"}),
                ranges="lsq",
                steps=2048,
                batch=2,
                learning_rate=2e-5,
                learning_rate_new=1e-4,
                schedule="cosine",
            ),
        ),
    ),
    "fdda": Recipe(
        summary="Rounding to nearest, then means and variances of the layers' outputs are corrected (after"
        " arXiv:2109.04186).",
        statistics=True,
    ),
}
"""Name -> recipe. A name such as "omniquant+fdda" adds the statistics to another recipe."""


def recipe_of(name: str) -> Recipe:
    """Return a recipe by its name: one of `RECIPES`, or NAME+fdda.

    Raises:
        UserError: the name is unknown.
    """
    if not isinstance(name, str):
        raise UserError(f"recipe must be a name, got {shown(name)}. Recipes: {', '.join(RECIPES)}")
    first, plus, second = name.partition("+")
    if first not in RECIPES or (plus and second != "fdda"):
        raise UserError(
            f"the recipe {shown(name)} is unknown.{did_you_mean(first, RECIPES)} Recipes: {', '.join(RECIPES)};"
            " NAME+fdda adds the correction of statistics"
        )
    return replace(RECIPES[first], statistics=True) if plus else RECIPES[first]
