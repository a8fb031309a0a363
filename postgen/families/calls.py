"""Forward arguments for the registered transformers at a given size, with the shapes that their pipelines pass.

Cost counting and latency measurement use them, because only the shapes matter there. Values are random normal, and
masks mark every token as valid.
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
    """Return the keyword arguments of one forward pass.

    Args:
        kind: name of a registered transformer class.
        config: config of the transformer.
        size: size, device and dtype of the call.

    Raises:
        UserError: the class is unknown, or the config needs an optional package that is not installed.
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
    """Return the description of the forward arguments of a transformer class.

    Raises:
        UserError: the class is unknown, or its layout row has no `Call`.
    """
    tokens_named(kind)
    known = {row.transformer: row.call for row in known_layouts() if row.call is not None}
    if kind not in known:
        raise UserError(
            f"postgen does not know how {kind} is called. Known: {', '.join(sorted(known))}. For another class, pass "
            "the arguments of its forward to postgen.families.cost.call_cost"
        )
    return known[kind]


def compression(kind: str, config: Any) -> tuple[int, int]:
    """Return the compression of the autoencoder that the class is published with.

    Returns:
        Frames in a latent frame, and pixels per side in a latent pixel.
    """
    call = call_of(kind)
    # The autoencoder of Wan 2.2 5B has 48 channels and compresses by 16 in space.
    wide = kind == "WanTransformer3DModel" and config["out_channels"] == 48
    # Cosmos 1 has learned positions and an autoencoder of its own. Cosmos 2 has none, and uses the autoencoder of Wan.
    slow = kind == "CosmosTransformer3DModel" and config["extra_pos_embed_type"] == "learnable"
    return 8 if slow else call.time, 16 if wide else call.space


# The functions below are the only access of cost, latency and linear replacement to the layout rows.


def registered_name(kind: type) -> str:
    """Return the class name under which a transformer class, or the first of its parents, is registered.

    Raises:
        UserError: neither the class nor one of its parents is registered.
    """
    return layout_named(*(parent.__name__ for parent in kind.__mro__)).transformer


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the repeated blocks of a transformer."""
    return tuple(layout_named(registered_name(type(model))).block_modules(model))


def self_attention_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the self-attention modules over the tokens of a video or picture."""
    return tuple(tokens_named(registered_name(type(model))).attention_modules(model))


def grid_of_call(model: nn.Module, arguments: Mapping[str, Any]) -> Grid | None:
    """Return the token grid of a call; None if the arguments do not determine it."""
    return tokens_named(registered_name(type(model))).grid(model, **arguments)


def makes_pictures(kind: str) -> bool:
    """Whether a registered class makes pictures; postgen treats a picture as a clip of one frame."""
    return layout_named(kind).image is not None


def _channels(config: Any) -> int:
    if "in_visual_dim" not in config:
        return int(config["in_channels"])
    # Kandinsky: channels of the noise and of the condition, and one that marks where there is a condition.
    return 2 * config["in_visual_dim"] + 1 if config["visual_cond"] else int(config["in_visual_dim"])
