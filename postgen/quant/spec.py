"""What to quantise: formats of weights and activations of the linear layers of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from postgen.errors import UserError, did_you_mean, is_whole, shown, why_no_pattern
from postgen.quant.formats import Format, format_of


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """How one linear layer is quantised."""

    weight: Format | None
    """Format of the weight; None keeps it exact."""
    act: Format | None = None
    """Format of the input, quantised in every call; None keeps it exact."""
    rotate: int = 0
    """Size of the Hadamard blocks that rotate the channels of input and weight, a power of two; 0: no rotation."""
    rank: int = 0
    """Rank of an exact low-rank branch that takes the largest part of the weight (arXiv:2411.05007); 0: none."""

    @property
    def exact(self) -> bool:
        """Whether the layer stays as it is."""
        return self.weight is None and self.act is None


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantSpec:
    """How a model is quantised: one choice for all quantised layers, and exceptions by name.

    Raises:
        UserError: a value has the wrong type or is out of range, or an exception names an unknown key.
    """

    weight: str | None = "int4:g64"
    """Format of the weights, see `format_of`; None keeps them exact."""
    act: str | None = None
    """Format of the inputs; None keeps them exact."""
    rotate: int = 0
    """As `LayerSpec.rotate`."""
    rank: int = 0
    """As `LayerSpec.rank`."""
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Exceptions: a regular expression for the full name of a layer -> other values of the four keys above. The first
    expression that matches decides. {"weight": None, "act": None} keeps a layer exact. An expression that matches only
    layers of attention and feed-forward networks that stay exact by default, such as the keys and values of the text,
    quantises them."""
    modulation: str | None = None
    """Format of the weights of the layers in the blocks that compute scales, shifts and gates from the timestep, such
    as int8; None keeps them exact. They are rounded to nearest, and their inputs stay exact. Of `overrides`, only one
    whose weight is None applies to them."""

    def __post_init__(self) -> None:
        self._check({name: getattr(self, name) for name in KEYS}, "")
        if not isinstance(self.overrides, Mapping):
            raise UserError(f"overrides must map patterns of layer names to settings, got {shown(self.overrides)}")
        for pattern, said in self.overrides.items():
            if reason := why_no_pattern(pattern):
                raise UserError(f"{shown(pattern)} in overrides is not a regular expression: {reason}")
            if not isinstance(said, Mapping):
                raise UserError(f"overrides[{pattern!r}] must be a mapping, got {shown(said)}")
            for key in said:
                if key not in KEYS:
                    raise UserError(
                        f"{shown(key)} in overrides[{pattern!r}] is unknown.{did_you_mean(str(key), KEYS)} Keys:"
                        f" {', '.join(KEYS)}"
                    )
            self._check(said, f" in overrides[{pattern!r}]")
            if said.get("rank") and said.get("weight", self.weight) is None:
                raise UserError(
                    f"rank in overrides[{pattern!r}] has no use, because the weight is exact: leave it out"
                )
        if self.rank and not any(each is not None for each in (self.weight, *self._other("weight"))):
            raise UserError(f"rank is {self.rank}, but all weights are exact, so no branch has a use: leave rank out")
        if self.modulation is not None:
            format_of(self.modulation)
        if self.layer("").exact and not self.overrides and self.modulation is None:
            raise UserError("weight and act are both None, so nothing is quantised: set one of them")

    def layer(self, name: str) -> LayerSpec:
        """Return how the layer with this full name is quantised, if the policy of the model quantises it at all."""
        said: dict[str, Any] = {key: getattr(self, key) for key in KEYS}
        for pattern, other in self.overrides.items():
            if re.fullmatch(pattern, name):
                said |= other
                break
        formats = {key: None if said[key] is None else format_of(said[key]) for key in ("weight", "act")}
        return LayerSpec(**formats, rotate=said["rotate"], rank=said["rank"])

    def modulation_layer(self, name: str) -> LayerSpec:
        """Return how the layer of modulation with this full name is quantised."""
        said = next((other for pattern, other in self.overrides.items() if re.fullmatch(pattern, name)), {})
        exact = self.modulation is None or said.get("weight", "") is None
        return LayerSpec(weight=None if exact or self.modulation is None else format_of(self.modulation))

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as JSON values."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}

    def _other(self, key: str) -> list[Any]:
        return [said[key] for said in self.overrides.values() if key in said]

    @staticmethod
    def _check(said: Mapping[str, Any], where: str) -> None:
        for key in ("weight", "act"):
            if said.get(key) is not None:
                format = format_of(said[key])
                if key == "act" and format.planes:
                    raise UserError(f"act is {shown(said[key])}{where}: bit planes are for weights only")
        rotate = said.get("rotate", 0)
        if not is_whole(rotate, 0, 4096) or (rotate & (rotate - 1)) or rotate == 1:
            raise UserError(f"rotate is {shown(rotate)}{where}: it must be 0 or a power of two from 2 to 4096")
        if not is_whole(said.get("rank", 0), 0):
            raise UserError(f"rank is {shown(said['rank'])}{where}: it must be a whole number of at least 0")


KEYS = ("weight", "act", "rotate", "rank")
"""Keys of a spec that an exception can change."""


def _plain(value: Any) -> Any:
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, Mapping) else value
