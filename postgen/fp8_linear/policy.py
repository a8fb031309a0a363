"""The choice of the layers that compute in FP8, by their names and by the place of the video's self-attention."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from postgen.errors import UserError
from postgen.families import tokens_named
from postgen.families.calls import block_names
from postgen.families.linear import find_linears, replaced_linears
from postgen.families.linear_parts import LinearParts
from postgen.fp8_linear.config import FP8LinearConfig
from postgen.kernels.fp8_rows.ops import MULTIPLE

if TYPE_CHECKING:
    from torch import nn

OWNER = "fp8_linears"
"""The name of this owner in the registry of replaced linear layers; also the name of the plug-in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The layers of one transformer that compute in FP8 under given settings."""

    layers: Mapping[str, str]
    """Layer name -> its part, one of `PARTS`."""
    left: Mapping[str, str]
    """Layers that the settings select but the FP8 product does not accept: layer name -> shape as text."""
    least: int = 0
    """Layers with fewer input or output channels than this stay exact."""

    def counts(self) -> dict[str, int]:
        """Return the number of FP8 layers by part, and under `left` the number that stay exact for their shape."""
        counts: dict[str, int] = {}
        for part in self.layers.values():
            counts[part] = counts.get(part, 0) + 1
        return counts | ({"left": len(self.left)} if self.left else {})


def check_known(transformer: str) -> None:
    """Check that the positions of the video or image tokens are known for a transformer class.

    Args:
        transformer: the name of the class.

    Raises:
        UserError: the class is unknown; the message lists the known classes.
    """
    tokens_named(transformer)


def plan_for(model: nn.Module, config: FP8LinearConfig, least: int = 0) -> Plan:
    """Find the layers of a transformer that compute in FP8, in its current state.

    Args:
        model: the transformer.
        config: the settings.
        least: the smallest number of input or output channels of a layer that computes in FP8.

    Raises:
        UserError: the transformer is unknown, another owner has replaced a selected layer, no layer matches
            `config.exact`, or no layer is left.
    """
    parts = LinearParts(model)
    exact = None if config.exact is None else re.compile(config.exact)
    spared = _spared(block_names(model), config)
    layers: dict[str, str] = {}
    left: dict[str, str] = {}
    narrow = 0

    def asked(name: str) -> str | None:
        part = parts.of(name)
        if part is None or not getattr(config, part) or name.startswith(spared):
            return None
        return None if exact is not None and exact.fullmatch(name) else part

    for other in replaced_linears(model).values():
        if other.owner != OWNER and (taken := [name for name in other.modules if asked(name)]):
            raise UserError(f"{taken[0]} is already replaced by {other.owner}: remove {other.owner} before {OWNER}")
    linears = find_linears(model)
    if exact is not None and not any(map(exact.fullmatch, linears)):
        some = ", ".join(list(linears)[:3])
        raise UserError(f"no layer matches the pattern exact={config.exact!r}. Layers of this model: {some}, ...")
    for name, linear in linears.items():
        if (part := asked(name)) is None:
            continue
        if min(linear.in_features, linear.out_features) < least:
            narrow += 1
        elif linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            left[name] = f"{linear.in_features} x {linear.out_features}"
        else:
            layers[name] = part
    if not layers:
        why = f"{len(left)} layers have channels not divisible by {MULTIPLE}" if left else "the settings exclude all"
        if narrow:
            why = (
                f"{narrow} layers have fewer than {least} inputs or outputs and would be no faster;"
                " leave FP8 linear layers out, or set min_features=0 in FP8LinearConfig to use them"
            )
        raise UserError(f"there is no layer for FP8 in this {type(model).__name__}: {why}")
    return Plan(layers=layers, left=left, least=least)


def _spared(blocks: tuple[str, ...], config: FP8LinearConfig) -> tuple[str, ...]:
    """Return the name prefixes of the blocks that stay exact (`first_exact_blocks`, `last_exact_blocks`)."""
    last = max(0, len(blocks) - config.last_exact_blocks)
    return tuple(f"{name}." for name in (*blocks[: config.first_exact_blocks], *blocks[last:]))
