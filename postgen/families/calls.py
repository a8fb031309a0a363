"""Calls of the registered transformers at a given size: what a pipeline would pass, filled with noise.

For counting and timing, where only shapes matter. Values are random normal; masks say that every token counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from postgen.errors import UserError
from postgen.families import call_extras
from postgen.families.call_extras import Size
from postgen.families.layout import Call
from postgen.families.registry import known_layouts, layout_named, tokens_named
from postgen.families.video_tokens import Grid


def call_arguments(kind: str, config: Any, size: Size) -> dict[str, Any]:
    """Return keyword arguments of one forward.

    Args:
        kind: a registered transformer class.
        config: its config.
        size: how large, where and in which dtype.

    Raises:
        UserError: an unknown class, or a config that needs an optional package which is not there.
    """
    call = call_of(kind)
    arguments = {
        "hidden_states": size.latents(_channels(config), tokens_named(kind).latent_axes),
        "timestep": size.full(500.0),
    }
    if call.text_width is not None:
        arguments["encoder_hidden_states"] = size.text(config[call.text_width])
    extras = getattr(call_extras, call.extras) if isinstance(call.extras, str) else call.extras
    return {**arguments, **extras(config, size)}


def call_of(kind: str) -> Call:
    """Return how a class is called.

    Raises:
        UserError: unknown.
    """
    tokens_named(kind)
    known = {row.transformer: row.call for row in known_layouts() if row.call is not None}
    if kind not in known:
        raise UserError(
            f"it is not known how {kind} is called. Known: {', '.join(sorted(known))}. For another class give the "
            "arguments of its forward to postgen.families.cost.call_cost"
        )
    return known[kind]


def compression(kind: str, config: Any) -> tuple[int, int]:
    """Return how many frames and how many pixels a side make a latent, by the autoencoder the class is used with."""
    call = call_of(kind)
    # The autoencoder of Wan 2.2 5B has 48 channels and shrinks by 16.
    wide = kind == "WanTransformer3DModel" and config["out_channels"] == 48
    # Cosmos 2 took the autoencoder of Wan, and lost the learned positions with it.
    slow = kind == "CosmosTransformer3DModel" and config["extra_pos_embed_type"] == "learnable"
    return 8 if slow else call.time, 16 if wide else call.space


# All that counting, timing and replacing layers read of the layout rows.


def registered_name(kind: type) -> str:
    """Return the class name under which a transformer class, or the first of its parents, is registered.

    Raises:
        UserError: none is.
    """
    return layout_named(*(parent.__name__ for parent in kind.__mro__)).transformer


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the repeated blocks."""
    return tuple(layout_named(registered_name(type(model))).block_modules(model))


def self_attention_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that attend among the tokens of a video or picture."""
    return tuple(tokens_named(registered_name(type(model))).attention_modules(model))


def grid_of_call(model: nn.Module, arguments: Mapping[str, Any]) -> Grid | None:
    """Return the token grid of a call; None where it does not tell."""
    return tokens_named(registered_name(type(model))).grid(model, **arguments)


def makes_pictures(kind: str) -> bool:
    """Whether a registered class makes pictures, which are clips of one frame here."""
    return layout_named(kind).image is not None


def _channels(config: Any) -> int:
    if "in_visual_dim" not in config:
        return int(config["in_channels"])
    # Kandinsky: noise, condition, and whether there is one.
    return 2 * config["in_visual_dim"] + 1 if config["visual_cond"] else int(config["in_visual_dim"])
