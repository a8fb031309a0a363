"""Where the tokens of a video, or of a picture, are inside self-attention."""

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
"""Order of the tokens that self-attention sees. `history-video`: the current frames are the last of the video;
`video-reference`: they are the first, tokens of reference frames may follow in the same stream."""

LatentAxes = Literal["BCTHW", "BTCHW", "BTHWC", "BCHW", "packed"]
"""Axes of `hidden_states` as the transformer's forward takes them; `BCHW` is a picture, `packed` is (B, T*H*W, C)."""

ScaleTarget = Literal["attention", "norm2"]
"""Which module's output a scalar on the attention output must multiply: the self-attention itself, or the block's
`norm2` where a norm behind the attention would cancel any scalar."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Token grid of the video after patching: the tokens are ordered frame by frame, each frame row by row."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Number of video tokens, frames * height * width."""
        return self.frames * self.height * self.width


GridRule = Callable[[Any, Mapping[str, Any]], Grid | None]
"""(config of the transformer, its forward arguments by name) -> grid, or None where the arguments do not tell."""

CausalRule = Callable[[Any], int]
"""config of the transformer -> frames in a block of block-causal attention, 0 where attention is not causal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoTokens:
    """The part of a row that says how the tokens of a video pass through softmax attention over its frames.

    A picture is a video of one frame.
    """

    self_attention: str
    """Pattern that the names of the video self-attention modules match in full."""
    token_order: TokenOrder
    """Order of the tokens inside self-attention."""
    latent_axes: LatentAxes
    """Axes of `hidden_states`."""
    grid_rule: GridRule
    """How to read the token grid off the forward arguments."""
    attention_call: Literal["dispatch", "sdpa"]
    """Whether the processor goes through diffusers' attention dispatcher or calls torch's SDPA itself."""
    scale_target: ScaleTarget = "attention"
    """Where a scalar on the attention output takes effect."""
    factorised: bool = False
    """Whether self-attention is temporal by itself: (batch * locations) sequences of T tokens."""
    causal_rule: CausalRule | None = None
    """How many frames are in a block, where a frame attends to no later block; None: every frame sees every frame."""

    def attention_modules(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """Return the video self-attention modules by name, in the order of the model.

        Raises:
            UserError: none matches; the model's structure is not what the row says.
        """
        named = transformer.named_modules()
        found = {name: module for name, module in named if re.fullmatch(self.self_attention, name)}
        if not found:
            raise UserError(
                f"{type(transformer).__name__} has no self-attention modules named {self.self_attention!r}:"
                " its layout row is out of date"
            )
        return found

    def grid(self, transformer: nn.Module, *args: Any, **kwargs: Any) -> Grid | None:
        """Return the token grid of a call `transformer(*args, **kwargs)`, without making it; None: unknown."""
        # The class's own forward: hooks may have replaced the instance's by one that takes anything.
        call = inspect.signature(type(transformer).forward).bind_partial(transformer, *args, **kwargs)
        return self.grid_rule(transformer.config, call.arguments)


def grid_bcthw(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read (B, C, T, H, W) latents patched by `config.patch_size`, three numbers, or one and `patch_size_t`."""
    _, _, frames, height, width = arguments["hidden_states"].shape
    patch_t, patch_h, patch_w = patch_of(config)
    return Grid(frames=frames // patch_t, height=height // patch_h, width=width // patch_w)


def grid_btchw(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read (B, T, C, H, W) latents; a last patch that is not full counts as one in time."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch_t, patch_h, patch_w = patch_of(config)
    return Grid(frames=-(-frames // patch_t), height=height // patch_h, width=width // patch_w)


def grid_bchw(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read a picture (B, C, H, W) patched by `config.patch_size`, one number."""
    _, _, height, width = arguments["hidden_states"].shape
    return Grid(frames=1, height=height // config.patch_size, width=width // config.patch_size)


def grid_of_ids(config: Any, arguments: Mapping[str, Any]) -> Grid | None:
    """Read places (L, 3) of packed tokens, which may have a batch axis: picture, row, column.

    None where they are no grid: tokens of a given picture stand behind those of the one that is made.
    """
    places = arguments.get("img_ids")
    if places is None:
        return None
    return _grid_of_coordinates((places if places.dim() == 2 else places[0]).T)


def grid_packed(config: Any, arguments: Mapping[str, Any]) -> Grid | None:
    """Read `num_frames`, `height`, `width` of packed tokens (B, T*H*W, C), or count them in `video_coords`.

    None where neither tells: tokens of references among those of the video make the coordinates no grid.
    """
    frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
    # Pipelines that pass coordinates write 1 for each of the sizes, or leave them out.
    if frames is not None and height is not None and width is not None and frames * height * width > 1:
        return Grid(frames=frames, height=height, width=width)
    coordinates = arguments.get("video_coords")
    return None if coordinates is None else _grid_of_coordinates(coordinates[0])


def _grid_of_coordinates(coordinates: Tensor) -> Grid | None:
    """Coordinates of the tokens in time, height and width (3, L), or where each begins and ends (3, L, 2)."""
    begins = coordinates if coordinates.dim() == 2 else coordinates[..., 0]
    frames, height, width = (axis.unique().numel() for axis in begins)
    return Grid(frames=frames, height=height, width=width) if frames * height * width == begins.shape[1] else None


def patch_of(config: Any) -> tuple[int, int, int]:
    """Return latent frames, rows and columns in a token, by `patch_size`, three numbers or one and `patch_size_t`."""
    size = config.patch_size
    if isinstance(size, int):
        # CogVideoX writes None for no patches in time.
        return config.get("patch_size_t") or 1, size, size
    patch_t, patch_h, patch_w = size
    return patch_t, patch_h, patch_w
