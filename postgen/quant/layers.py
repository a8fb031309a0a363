"""Which layers of a transformer are quantised, and how.

Quantised are the linear layers of the repeated blocks that process the many video or image tokens: projections of
self-attention, queries and output of cross-attention, and feed-forward networks. Embeddings, norms, modulation, the
output layer, and layers that process only the few text tokens stay exact, because they cost little and rounding hurts
there. An exception that matches only such attention or feed-forward layers quantises them, and `QuantSpec.modulation`
those of modulation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from postgen.errors import UserError, cut_words, shown
from postgen.families.installed import inner_model
from postgen.families.linear import Role, find_linears, role_of
from postgen.families.linear_parts import LinearPart, LinearParts, shares_input
from postgen.quant.linear import QLinear, check_spec
from postgen.quant.spec import LayerSpec, QuantSpec

if TYPE_CHECKING:
    from torch import nn

_ALL: tuple[Role, ...] = ("attention", "feed_forward", "modulation")


def layers_of(model: nn.Module, spec: QuantSpec) -> dict[str, LayerSpec]:
    """Return how each quantised layer of a transformer is quantised, by its name, in the order of the model.

    Layers of modulation are not among them, see `modulation_of`.

    Args:
        model: a transformer whose layers are not yet quantised; it may be wrapped (peft, compiled).
        spec: what to quantise.

    Raises:
        UserError: `spec` is no QuantSpec, the class of the transformer has no layout, a pattern of `overrides` matches
            no layer that could be quantised, a format or a rotation does not fit a layer (the message names it), a
            weight is not finite, or no layer is left.
    """
    if not isinstance(spec, QuantSpec):
        raise UserError(f"spec must be a QuantSpec, such as QuantSpec(weight='int4:g64'), got {shown(spec)}")
    parts, linears = parts_of(model), find_linears(model)
    added: set[str] = set()
    for pattern in spec.overrides:
        matched = {name for name in linears if re.fullmatch(pattern, name)}
        if not matched:
            raise UserError(_no_match(pattern, parts, model))
        if not matched & parts.keys():
            added |= matched
    found = {name: spec.layer(name) for name in linears if name in parts or name in added}
    found = {name: each for name, each in found.items() if not each.exact}
    if not (found or modulation_of(model, spec)):
        raise UserError("the overrides keep every layer exact, so nothing is quantised: remove one of them")
    for name, each in found.items():
        _check_layer(name, linears[name], each)
    return found


def modulation_of(model: nn.Module, spec: QuantSpec) -> dict[str, LayerSpec]:
    """Return how each quantised layer of modulation is quantised, by its name; none without `spec.modulation`.

    Raises:
        UserError: the format does not fit a layer, a weight is not finite, or the blocks have no such layers.
    """
    if spec.modulation is None:
        return {}
    linears = {name: each for name, each in find_linears(model, roles=_ALL).items() if role_of(name) == "modulation"}
    if not linears:
        raise UserError(
            f"the blocks of {type(inner_model(model)).__name__} have no linear layers of modulation: leave modulation"
            " out"
        )
    found = {name: each for name in linears if not (each := spec.modulation_layer(name)).exact}
    for name, each in found.items():
        _check_layer(name, linears[name], each)
    return found


def _check_layer(name: str, linear: nn.Linear, spec: LayerSpec) -> None:
    try:
        check_spec(spec, linear.in_features)
        if spec.rank > min(linear.in_features, linear.out_features):
            raise UserError(f"rank is {spec.rank}, but the layer is {linear.out_features} x {linear.in_features}")
        _check_finite(linear)
    except UserError as error:
        raise UserError(f"{name} cannot be quantised: {error}") from None


def parts_of(model: nn.Module) -> dict[str, LinearPart]:
    """Return the layers of a transformer that can be quantised: name -> part of its block.

    Raises:
        UserError: the class of the transformer has no layout, or it has no such layers.
    """
    parts = LinearParts(inner_model(model))
    found = {name: part for name in find_linears(model) if (part := parts.of(name)) is not None}
    if not found:
        raise UserError(f"{type(model).__name__} has no linear layers that process its video tokens")
    return found


def quantized_layers(model: nn.Module) -> dict[str, QLinear]:
    """Return the quantised layers of a model by name. Inside a peft wrapper, the name is that of the wrapper."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, QLinear)
    }


def note_shared_inputs_(model: nn.Module) -> None:
    """Tell the quantised query, key and value projections of a model that they read the same tokens."""
    inner = inner_model(model)
    parts = LinearParts(inner)
    for name, layer in quantized_layers(inner).items():
        part = parts.of(name)
        layer.shares_input = part is not None and shares_input(name, part)


def _check_finite(linear: nn.Linear) -> None:
    for name, values in linear.named_parameters():
        if not values.is_meta and not bool(values.isfinite().all()):
            raise UserError(
                f"its {name} has NaN or infinite numbers; if float16 is too small for it, load the model in bfloat16"
            )


def _no_match(pattern: str, parts: Mapping[str, LinearPart], model: nn.Module) -> str:
    exact = [name for name, _ in model.named_modules() if name not in parts and re.fullmatch(pattern, name)]
    if exact:
        stays = (
            "which modulation='int8' quantises" if role_of(exact[0]) == "modulation" else "which always stays exact"
        )
        return (
            f"the pattern {pattern!r} of overrides matches {exact[0]}, {stays}, and no layer that is quantised, such"
            f" as {next(iter(parts))}"
        )
    known = cut_words(", ".join(parts), 200)
    hint = ""
    if any(re.search(pattern, name) for name in parts):
        hint = f" It must match the whole name: use {f'.*{pattern}.*'!r}."
    return f"the pattern {pattern!r} of overrides matches no layer that is quantised.{hint} Layers: {known}"
