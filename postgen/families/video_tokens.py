"""Position and order of the tokens of a video, or of a picture, inside self-attention."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from postgen.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

TokenOrder = Literal["video", "video-text", "text-video", "history-video", "history-video-text", "video-reference"]
"""Order of the tokens in self-attention. In `history-video`, the current frames are the last of the video tokens. In
`video-reference`, they are the first; tokens of reference frames may follow in the same sequence."""

LatentAxes = Literal["BCTHW", "BTCHW", "BTHWC", "BCHW", "packed"]
"""Axes of the transformer's argument `hidden_states`; `BCHW` is a picture, `packed` is (B, T*H*W, C)."""

ScaleTarget = Literal["attention", "norm2"]
"""Module whose output must be multiplied to scale the attention: the self-attention, or the block's `norm2` if that
norm follows the attention and would cancel a factor on its output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Token grid of the video after patching. Tokens are ordered frame by frame, and each frame row by row."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Number of video tokens, frames * height * width."""
        return self.frames * self.height * self.width


GridRule = Callable[[Any, Mapping[str, Any]], Grid | None]
"""Function of the transformer's config and its forward arguments by name that returns the grid.

It returns None if the arguments do not determine the grid.
"""

CausalRule = Callable[[Any], int]
"""Function of the transformer's config that returns the frames per block of block-causal attention; 0: not causal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoTokens:
    """Description of the video tokens in the softmax self-attention of a transformer class.

    A picture is a video of one frame.
    """

    self_attention: str
    """Regular expression that matches the full names of the video self-attention modules."""
    token_order: TokenOrder
    """Order of the tokens inside self-attention."""
    latent_axes: LatentAxes
    """Axes of `hidden_states`."""
    grid_rule: GridRule
    """Function that computes the token grid from the forward arguments."""
    attention_call: Literal["dispatch", "sdpa"]
    """Whether the processor calls diffusers' attention dispatcher or torch's SDPA."""
    scale_target: ScaleTarget = "attention"
    """Module whose output must be multiplied to scale the attention."""
    factorised: bool = False
    """Whether these modules attend over time only, on (batch * positions) sequences of T tokens."""
    causal_rule: CausalRule | None = None
    """Function that returns the frames per block of block-causal attention; None if all frames attend to all."""

    def attention_modules(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """Return the video self-attention modules by name, in the order of the model.

        Raises:
            UserError: no module matches, because the model's structure differs from the row.
        """
        named = transformer.named_modules()
        found = {name: module for name, module in named if re.fullmatch(self.self_attention, name)}
        if not found:
            raise UserError(
                f"{type(transformer).__name__} has no self-attention modules named {self.self_attention!r}:"
                " its layout row is out of date, update it"
            )
        return found

    def grid(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> Grid | None:
        """Return the token grid of a call `transformer(*args, **kwargs)`, without the call; None if unknown."""
        # The signature of the class: hooks may have replaced the instance's forward by one without named arguments.
        call = inspect.signature(type(transformer).forward).bind_partial(transformer, *args, **kwargs)
        return self.grid_rule(transformer.config, call.arguments)


def grid_bcthw(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Return the grid of latents (B, C, T, H, W); `patch_of` has the patch size."""
    _, _, frames, height, width = arguments["hidden_states"].shape
    patch_t, patch_h, patch_w = patch_of(config)
    return Grid(frames=frames // patch_t, height=height // patch_h, width=width // patch_w)


def grid_btchw(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Return the grid of latents (B, T, C, H, W); an incomplete last patch in time counts as a whole one."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch_t, patch_h, patch_w = patch_of(config)
    return Grid(frames=-(-frames // patch_t), height=height // patch_h, width=width // patch_w)


def grid_bchw(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Return the grid of a picture (B, C, H, W); `config.patch_size` is one number."""
    _, _, height, width = arguments["hidden_states"].shape
    return Grid(frames=1, height=height // config.patch_size, width=width // config.patch_size)


def grid_of_ids(config: Any, arguments: Mapping[str, Any]) -> Grid | None:
    """Return the grid of packed tokens from `img_ids`, (L, 3) or (B, L, 3): picture, row, column of each token.

    None if the tokens are not a grid, because tokens of a given picture follow those of the generated picture.
    """
    places = arguments.get("img_ids")
    if places is None:
        return None
    return _grid_of_coordinates((places if places.dim() == 2 else places[0]).T)


def grid_packed(config: Any, arguments: Mapping[str, Any]) -> Grid | None:
    """Return the grid of packed tokens (B, T*H*W, C) from `num_frames`, `height`, `width` or from `video_coords`.

    None if neither determines it: with additional tokens of references, the coordinates are not a grid.
    """
    frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
    # Pipelines that pass coordinates omit the sizes or set each of them to 1.
    if frames is not None and height is not None and width is not None and frames * height * width > 1:
        return Grid(frames=frames, height=height, width=width)
    coordinates = arguments.get("video_coords")
    return None if coordinates is None else _grid_of_coordinates(coordinates[0])


def _grid_of_coordinates(coordinates: Tensor) -> Grid | None:
    """Return the grid of tokens with these coordinates; None if they are not a grid.

    Args:
        coordinates: time, row and column of each token, (3, L), or their begin and end, (3, L, 2).
    """
    begins = coordinates if coordinates.dim() == 2 else coordinates[..., 0]
    frames, height, width = (axis.unique().numel() for axis in begins)
    return Grid(frames=frames, height=height, width=width) if frames * height * width == begins.shape[1] else None


def patch_of(config: Any) -> tuple[int, int, int]:
    """Return the latent frames, rows and columns of a token.

    The config has `patch_size` with three numbers, or `patch_size` with one number and `patch_size_t`.
    """
    size = config.patch_size
    if isinstance(size, int):
        # CogVideoX has None if patches have no extent in time.
        return config.get("patch_size_t") or 1, size, size
    patch_t, patch_h, patch_w = size
    return patch_t, patch_h, patch_w
