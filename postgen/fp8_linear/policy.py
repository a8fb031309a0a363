"""Which layers of a transformer are taken, by their names and by where the video's attention is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from postgen.errors import UserError
from postgen.families import tokens_named
from postgen.families.calls import block_names, self_attention_names
from postgen.families.linear import find_linears, replaced_linears, role_of
from postgen.fp8_linear.config import FP8LinearConfig
from postgen.kernels.fp8_rows.ops import MULTIPLE

if TYPE_CHECKING:
    from torch import nn

OWNER = "fp8_linears"
"""Among those who replace linear layers; also the name of the plug-in."""

_FEW_TOKENS = re.compile(r"context|txt|text|audio|\bav_|\badd_|to_add_out")
_ADDED = re.compile(r"\bpostgen_")
"""Layers that a method of ours gave the model: gates of linear attention, say."""
_KEY_OR_VALUE = re.compile(r"(to_)?(k|v|kv|key|value)(_proj)?")
_QUERY_KEY_VALUE = re.compile(r"(to_)?(q|k|v|query|key|value)(_proj)?")
_AFTER_ACTIVATION = re.compile(r".*\.(net\.2|proj_out|out_layer|linear_2|fc2|w2|down_proj)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What settings take on one transformer."""

    layers: Mapping[str, str]
    """Name of a layer -> its part, one of `PARTS`."""
    left: Mapping[str, str]
    """Layers that settings ask for and the product cannot take -> their shape in words."""
    least: int = 0
    """Layers of fewer input or output channels were left."""

    def counts(self) -> dict[str, int]:
        """Return how many layers of each part are taken, and how many are left for their shape."""
        counts: dict[str, int] = {}
        for part in self.layers.values():
            counts[part] = counts.get(part, 0) + 1
        return counts | ({"left": len(self.left)} if self.left else {})


def check_known(transformer: str) -> None:
    """Refuse a transformer class, by its name, of which it is not known where its video or picture is.

    Raises:
        UserError: it names those that are.
    """
    tokens_named(transformer)


def plan_for(model: nn.Module, config: FP8LinearConfig, least: int = 0) -> Plan:
    """Find the layers that settings take on a transformer as it is now.

    Args:
        model: the transformer.
        config: the settings.
        least: input and output channels of a layer that is taken.

    Raises:
        UserError: an unknown transformer, a layer that another owner replaced, or nothing to take.
    """
    parts = _Parts(model)
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
            raise UserError(f"{taken[0]} is replaced by {other.owner} already: remove that before {OWNER}")
    for name, linear in find_linears(model).items():
        if (part := asked(name)) is None:
            continue
        if min(linear.in_features, linear.out_features) < least:
            narrow += 1
        elif linear.in_features % MULTIPLE or linear.out_features % MULTIPLE:
            left[name] = f"{linear.in_features} x {linear.out_features}"
        else:
            layers[name] = part
    if not layers:
        why = f"{len(left)} have channels that {MULTIPLE} does not divide" if left else "the settings leave none"
        if narrow:
            why = (
                f"{narrow} have fewer than {least} inputs or outputs and would be no faster; min_features=0 takes them"
            )
        raise UserError(f"there is no layer for FP8 in this {type(model).__name__}: {why}")
    return Plan(layers=layers, left=left, least=least)


def shares_input(name: str, part: str) -> bool:
    """Whether a layer is one of those that read the same tokens one after the other."""
    return part == "attention" and _QUERY_KEY_VALUE.fullmatch(name.rpartition(".")[2]) is not None


class _Parts:
    """What the layers of a transformer serve."""

    def __init__(self, model: nn.Module) -> None:
        # A module that attends to the same tokens in space has the name of the one that does in time.
        self._own = {name.rpartition(".")[2] for name in self_attention_names(model)}

    def of(self, name: str) -> str | None:
        """Return the part of a layer; None: it serves few tokens, or neither attention nor feed-forward."""
        role = role_of(name)
        if role not in ("attention", "feed_forward") or _FEW_TOKENS.search(name) or _ADDED.search(name):
            return None
        if role == "feed_forward":
            return "feed_forward_out" if _AFTER_ACTIVATION.fullmatch(name) else "feed_forward"
        if self._own.intersection(name.split(".")[:-1]):
            return "attention"
        return None if _KEY_OR_VALUE.fullmatch(name.rpartition(".")[2]) else "cross_attention"


def _spared(blocks: tuple[str, ...], config: FP8LinearConfig) -> tuple[str, ...]:
    """Return the beginnings of the names of layers in the blocks that are left as they are."""
    last = max(0, len(blocks) - config.exact_last)
    return tuple(f"{name}." for name in (*blocks[: config.exact_first], *blocks[last:]))
