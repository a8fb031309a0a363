"""Know the model again that an adapter was trained on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from postgen.errors import UserError, is_number, shown
from postgen.worldweaver.widen import Widened, stock_channels

_MATRICES, _VALUES = 8, 4
"""How many matrices are looked at, and at how many values of each."""
_NEAR = 0.01
"""Relative difference that other number types make at most: bfloat16 keeps 8 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """A transformer before it was widened: what its config says, and some of its weights."""

    transformer: str
    """Class name."""
    config: dict[str, Any]
    """As JSON has it."""
    weights: dict[str, list[float]]
    """Values at fixed places of matrices that widening leaves alone, by parameter."""

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {"transformer": self.transformer, "config": self.config, "weights": self.weights}

    @classmethod
    def from_json(cls, note: dict[str, Any], place: Path) -> Base:
        """Read it.

        Raises:
            UserError: it is something else.
        """
        kind, config, weights = (note.get(name) for name in ("transformer", "config", "weights"))
        if not (isinstance(kind, str) and isinstance(config, dict) and isinstance(weights, dict) and weights):
            raise UserError(f"the adapter {place} is damaged: what it says of its base model is {shown(note)}")
        for name, values in weights.items():
            if not isinstance(values, list) or not values or not all(map(is_number, values)):
                raise UserError(f"the adapter {place} is damaged: of its base model's {name} it says {shown(values)}")
        return cls(transformer=kind, config=config, weights=weights)

    def check(self, model: nn.Module, wide: Widened | None, place: Path) -> None:
        """Refuse another model.

        Args:
            model: the transformer.
            wide: how it is widened; None: it is not.
            place: of the adapter, for the error.

        Raises:
            UserError: it is of another class or config, or has other weights.
        """
        said = f"the adapter {place} was trained on another model"
        kind, config = type(model).__name__, _config(model, wide)
        if kind != self.transformer:
            raise UserError(f"{said}: a {self.transformer}, this is a {kind}")
        # Another diffusers may know an entry more.
        for name in sorted(self.config.keys() & config.keys()):
            its, here = self.config[name], config[name]
            if its != here:
                raise UserError(f"{said}: its {name} is {shown(its)}, that of this one is {shown(here)}")
        matrices = _matrices(model)
        for name, values in self.weights.items():
            here = _sample(matrices[name]) if name in matrices else []
            pairs = zip(values, here, strict=False)
            if len(values) != len(here) or not all(math.isclose(a, b, rel_tol=_NEAR, abs_tol=1e-5) for a, b in pairs):
                raise UserError(f"{said}: a {kind} of the same size whose {name} has other values")


def base_of(model: nn.Module, wide: Widened) -> Base:
    """Look at a widened transformer, leaving out what widening changed.

    Raises:
        UserError: its weights are not in memory.
    """
    # The layers that are widened are trained as a whole.
    skipped = (f"{wide.widths.first}.", f"{wide.widths.last}.")
    matrices = {name: value for name, value in _matrices(model).items() if not name.startswith(skipped)}
    names = sorted(matrices)
    picked = (names[place] for place in _spread(len(names), _MATRICES))
    weights = {name: _sample(matrices[name]) for name in picked}
    return Base(transformer=type(model).__name__, config=_config(model, wide), weights=weights)


def _config(model: Any, wide: Widened | None) -> dict[str, Any]:
    """What the config of the stock model says, as JSON has it."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    if wide is not None:
        config |= wide.before or stock_channels(wide, config)
    if "out_channels" in config:
        config["out_channels"] = config["out_channels"] or config["in_channels"]
    read: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return read


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    """Matrices and kernels of a model by name, without those of a LoRA on it."""
    named = ((name.replace(".base_layer.", "."), value) for name, value in model.named_parameters())
    return {name: value for name, value in named if "lora_" not in name and value.dim() > 1 and value.numel()}


def _sample(weight: Tensor) -> list[float]:
    if weight.is_meta:
        raise UserError("the weights of the transformer are offloaded: load the model without offloading")
    flat = weight.detach().flatten()
    return [float(flat[place]) for place in _spread(len(flat), _VALUES)]


def _spread(count: int, wanted: int) -> Iterable[int]:
    """Return up to so many places among a count, evenly."""
    return (
        sorted({(2 * each + 1) * count // (2 * wanted) for each in range(wanted)}) if count > wanted else range(count)
    )
