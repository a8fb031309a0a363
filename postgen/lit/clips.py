"""Which grid of tokens a clip has, and whether the layers of a converted transformer compute on it."""

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
    """Return the grid of the video's tokens for a clip of a size in pixels; None where calls do not tell it.

    Raises:
        UserError: an unknown class, or a size that the model cannot make.
    """
    model: Any = transformer
    kind = registered_name(type(model))
    size = latent_size(kind, model.config, num_frames, height, width)
    return grid_of_call(model, call_arguments(kind, model.config, size))


def check_clip(config: Mapping[str, Any], num_frames: int, height: int, width: int) -> None:
    """Hold the layers of a converted transformer to the size of a clip, before any weights are read.

    Args:
        config: of the transformer, as its config.json has it.
        num_frames: of the clip.
        height: in pixels.
        width: in pixels.

    Raises:
        UserError: as `empty` and `grid_of_clip`, or a layer is made for another grid and bound to it.
    """
    check_layers(empty(config), num_frames, height, width)


def check_layers(transformer: nn.Module, num_frames: int, height: int, width: int) -> None:
    """Hold the layers of a converted transformer to the size of a clip; it may be without weights.

    Raises:
        UserError: as `check_clip`.
    """
    grid = grid_of_clip(transformer, num_frames, height, width)
    if grid is None:
        return
    for layer in layers_of(transformer).values():
        if not layer.covers(grid):
            layer.flops(grid, 0)  # refuses what the call would
