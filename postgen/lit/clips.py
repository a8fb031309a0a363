"""Find the grid of tokens of a clip, and check that the layers of a converted transformer can compute on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from postgen.families import Grid
from postgen.families.calls import call_arguments, grid_of_call, registered_name
from postgen.families.cost import latent_size
from postgen.lit.convert import layers_of
from postgen.lit.saving import empty


def grid_of_clip(transformer: nn.Module, num_frames: int, height: int, width: int) -> Grid | None:
    """Return the grid of the video tokens for a clip.

    Args:
        transformer: the transformer.
        num_frames: frames of the clip.
        height: in pixels.
        width: in pixels.

    Returns:
        The grid, or None if the arguments of a call do not determine it.

    Raises:
        UserError: an unknown class, or a size that the model cannot generate.
    """
    model: Any = transformer
    kind = registered_name(type(model))
    size = latent_size(kind, model.config, num_frames, height, width)
    return grid_of_call(model, call_arguments(kind, model.config, size))


def check_clip(config: Mapping[str, Any], num_frames: int, height: int, width: int) -> None:
    """Check that a converted transformer can compute a clip of this size, before any weights are read.

    Args:
        config: the content of the transformer's config.json.
        num_frames: frames of the clip.
        height: in pixels.
        width: in pixels.

    Raises:
        UserError: see `empty` and `grid_of_clip`; or a layer is bound to another grid.
    """
    check_layers(empty(config), num_frames, height, width)


def check_layers(transformer: nn.Module, num_frames: int, height: int, width: int) -> None:
    """Check that the layers of a converted transformer can compute a clip of this size.

    The transformer may be without weights, as `empty` returns it.

    Raises:
        UserError: see `check_clip`.
    """
    grid = grid_of_clip(transformer, num_frames, height, width)
    if grid is None:
        return
    for layer in layers_of(transformer).values():
        if not layer.covers(grid):
            layer.flops(grid, 0)  # raises the same error as a call
