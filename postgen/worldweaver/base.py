"""Identify the base model of an adapter, so that an adapter is not loaded into a different model."""

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
"""Number of matrices that are sampled, and number of values that are sampled from each matrix."""
_NEAR = 0.01
"""Allowed relative difference between sampled values. It covers a change of dtype: bfloat16 keeps 8 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """Fingerprint of a transformer before widening: its config and a sample of its weights."""

    transformer: str
    """Class name."""
    config: dict[str, Any]
    """Config of the stock model, with values that JSON can represent."""
    weights: dict[str, list[float]]
    """Parameter name -> values at fixed positions. Only matrices that widening does not change are sampled."""

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary of JSON values that `from_json` reads."""
        return {"transformer": self.transformer, "config": self.config, "weights": self.weights}

    @classmethod
    def from_json(cls, note: dict[str, Any], place: Path) -> Base:
        """Read a dictionary that `to_json` returned.

        Args:
            note: the dictionary.
            place: folder of the adapter, for the error message.

        Raises:
            UserError: an entry is missing or has the wrong type.
        """
        kind, config, weights = (note.get(name) for name in ("transformer", "config", "weights"))
        if not (isinstance(kind, str) and isinstance(config, dict) and isinstance(weights, dict) and weights):
            raise UserError(f"the adapter {place} is damaged: its description of the base model is {shown(note)}")
        for name, values in weights.items():
            if not isinstance(values, list) or not values or not all(map(is_number, values)):
                raise UserError(
                    f"the adapter {place} is damaged: its values of {name} of the base model are {shown(values)}"
                )
        return cls(transformer=kind, config=config, weights=weights)

    def check(self, model: nn.Module, wide: Widened | None, place: Path) -> None:
        """Check that a transformer is the base model that the adapter was trained on.

        Args:
            model: the transformer.
            wide: how the transformer is widened; None: the transformer is not widened.
            place: folder of the adapter, for the error message.

        Raises:
            UserError: the transformer has another class, another config or other weights.
        """
        said = f"the adapter {place} was trained on another model"
        kind, config = type(model).__name__, _config(model, wide)
        if kind != self.transformer:
            raise UserError(f"{said}: on a {self.transformer}, but the given transformer is a {kind}")
        # Another version of diffusers may have additional config entries, so only common entries are compared.
        for name in sorted(self.config.keys() & config.keys()):
            its, here = self.config[name], config[name]
            if its != here:
                raise UserError(f"{said}: {name} of its base is {shown(its)}, {name} of this model is {shown(here)}")
        matrices = _matrices(model)
        for name, values in self.weights.items():
            here = _sample(matrices[name]) if name in matrices else []
            pairs = zip(values, here, strict=False)
            if len(values) != len(here) or not all(math.isclose(a, b, rel_tol=_NEAR, abs_tol=1e-5) for a, b in pairs):
                raise UserError(f"{said}: on a {kind} of the same size with other values of {name}")


def base_of(model: nn.Module, wide: Widened) -> Base:
    """Return the fingerprint of a widened transformer, without the parts that widening changes.

    Raises:
        UserError: the weights are offloaded.
    """
    # The first and last layer are widened and trained as a whole, so their values do not identify the base.
    skipped = (f"{wide.widths.first}.", f"{wide.widths.last}.")
    matrices = {name: value for name, value in _matrices(model).items() if not name.startswith(skipped)}
    names = sorted(matrices)
    picked = (names[place] for place in _spread(len(names), _MATRICES))
    weights = {name: _sample(matrices[name]) for name in picked}
    return Base(transformer=type(model).__name__, config=_config(model, wide), weights=weights)


def _config(model: Any, wide: Widened | None) -> dict[str, Any]:
    """Return the config of the stock model with values that JSON can represent."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    if wide is not None:
        config |= wide.before or stock_channels(wide, config)
    if "out_channels" in config:
        config["out_channels"] = config["out_channels"] or config["in_channels"]
    read: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return read


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    """Return the matrices and convolution kernels of a model by name, without the matrices of a LoRA."""
    named = ((name.replace(".base_layer.", "."), value) for name, value in model.named_parameters())
    return {name: value for name, value in named if "lora_" not in name and value.dim() > 1 and value.numel()}


def _sample(weight: Tensor) -> list[float]:
    if weight.is_meta:
        raise UserError("the weights of the transformer are offloaded: load the model without offloading")
    flat = weight.detach().flatten()
    return [float(flat[place]) for place in _spread(len(flat), _VALUES)]


def _spread(count: int, wanted: int) -> Iterable[int]:
    """Return up to `wanted` evenly spaced positions below `count`."""
    return (
        sorted({(2 * each + 1) * count // (2 * wanted) for each in range(wanted)}) if count > wanted else range(count)
    )
