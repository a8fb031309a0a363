"""Settings of the layer types, and the settings that are in a converted model's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from postgen.errors import UserError, check_number, is_whole, shown

LINEAR_TYPES = ("lit", "mhla", "anchor", "chunk", "window_delta", "window_linear")
"""What a block's attention can be converted to."""
OF_FRAMES = ("chunk", "window_delta", "window_linear")
"""Those that tell frames apart: a picture has one, on which they are softmax."""
TYPES = ("softmax", *LINEAR_TYPES)
"""What a block's attention can be; softmax stays as it is."""


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Hold a setting to a few values.

    Raises:
        UserError: it is none of them.
    """
    if not any(value is each or (isinstance(value, str) and value == each) for each in allowed):
        raise UserError(f"{name} must be one of {', '.join(map(str, allowed))}, got {name}={shown(value)}")


def check_taps(name: str, value: Any) -> None:
    """Hold the side of a convolution to 0 (none) or an odd number.

    Raises:
        UserError: it is neither.
    """
    if not is_whole(value, 0, 31) or (value and value % 2 == 0):
        raise UserError(f"{name} must be 0 for none or an odd number up to 31, got {name}={shown(value)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LitOptions:
    """Layer type `lit`: one linear state of the whole clip (arXiv:2501.12976)."""

    feature_map: str = "relu"
    """relu, or elu for elu(x) + 1."""
    center_keys: bool = True
    """Subtract the mean over the video's tokens from the keys before the feature map (arXiv:2605.02772)."""
    conv_space: int = 5
    """Side of the depth-wise convolution of the values within each frame, 0 for none (guideline 1)."""
    conv_time: int = 3
    """Length of the one along time, 0 for none."""
    conv_init: str = "zero"
    """zero: at first it adds nothing; default: as torch starts a convolution."""
    merge_heads: int = 1
    """So many neighbouring heads become one (guideline 2)."""
    causal: bool = False
    """A frame sees itself and earlier frames only; needs `center_keys=False`."""
    eps: float = 1e-15
    """Added to the divisor."""

    def __post_init__(self) -> None:
        check_choice("feature_map", self.feature_map, ("relu", "elu"))
        check_choice("conv_init", self.conv_init, ("zero", "default"))
        for name in ("center_keys", "causal"):
            check_choice(name, getattr(self, name), (True, False))
        for name in ("conv_space", "conv_time"):
            check_taps(name, getattr(self, name))
        check_number("merge_heads", self.merge_heads, 1, 256, whole=True)
        check_number("eps", self.eps, 1e-30, 1)
        if self.causal and self.center_keys:
            raise UserError("causal=True needs center_keys=False: a mean over the whole clip knows later frames")


@dataclass(frozen=True, kw_only=True, slots=True)
class MhlaOptions:
    """Layer type `mhla`: states of blocks of the clip, mixed by learned weights (arXiv:2601.07832)."""

    blocks: tuple[int, int, int] = (1, 4, 4)
    """Blocks along frames, rows and columns on the grid that the layer was made for."""
    divisor: bool = True
    """False leaves the divisor out and takes the mean over keys instead, as the paper does for video. With text in the
    same attention there is a divisor anyway: softmax over the text has one."""
    interpolate: bool = True
    """On another grid blocks keep their size and the weights are interpolated; False refuses other grids."""
    feature_map: str = "relu"
    """As of `LitOptions`."""
    center_keys: bool = True
    """As of `LitOptions`."""
    conv_space: int = 0
    """As of `LitOptions`; the paper finds that a convolution hurts large models."""
    conv_time: int = 0
    """As of `LitOptions`."""
    conv_init: str = "zero"
    """As of `LitOptions`."""
    eps: float = 1e-15
    """As of `LitOptions`."""

    def __post_init__(self) -> None:
        given = self.blocks
        if not isinstance(given, tuple | list) or len(given) != 3 or not all(is_whole(n, 1, 1024) for n in given):
            raise UserError(f"blocks must be three whole numbers from 1 on: frames, rows, columns; got {shown(given)}")
        object.__setattr__(self, "blocks", tuple(given))
        for name in ("divisor", "interpolate", "center_keys"):
            check_choice(name, getattr(self, name), (True, False))
        check_choice("feature_map", self.feature_map, ("relu", "elu"))
        check_choice("conv_init", self.conv_init, ("zero", "default"))
        for name in ("conv_space", "conv_time"):
            check_taps(name, getattr(self, name))
        check_number("eps", self.eps, 1e-30, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorOptions:
    """Layer type `anchor`: softmax over every R-th token, linear over the rest (arXiv:2509.24899)."""

    every: int = 4
    """R; 1 is softmax."""
    feature_map: str = "learned"
    """learned: a small network per head, its two halves to the powers 1 and 2; else as of `LitOptions`."""

    def __post_init__(self) -> None:
        check_number("every", self.every, 1, 4096, whole=True)
        check_choice("feature_map", self.feature_map, ("learned", "relu", "elu"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkOptions:
    """Layer type `chunk`: softmax within a chunk of frames, linear over the other frames (arXiv:2601.04342)."""

    frames: int = 3
    """Tc, latent frames of a chunk."""
    overlap: int = 1
    """To, frames before the chunk that its queries see by softmax too."""
    causal: bool = False
    """Frames after the chunk are not seen, as published; False puts them into the linear part."""
    feature_map: str = "learned"
    """As of `AnchorOptions`."""

    def __post_init__(self) -> None:
        check_number("frames", self.frames, 1, 4096, whole=True)
        check_number("overlap", self.overlap, 0, 4096, whole=True)
        check_choice("causal", self.causal, (True, False))
        check_choice("feature_map", self.feature_map, ("learned", "relu", "elu"))


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowOptions:
    """Layer types `window_delta` and `window_linear`: softmax in a window of frames, a frame-wise memory of the rest
    (arXiv:2609.20744)."""

    chunk: int = 1
    """Frames that share a window."""
    radius: int = 2
    """Chunks before and after the own one that are in its window."""
    anchors: str = "none"
    """none, first or both: the first (and last) frame is dense, as queries and as keys, and not in the memory."""
    conv: bool = True
    """Depth-wise convolutions, 5 x 5 in space and 5 in time, on the memory's keys and values."""
    scale_memory: bool = True
    """Scale keys of the memory by sqrt(min(1, D / S)), S tokens a frame, so that a frame does not erase the past."""
    output: str = "full"
    """full: a matrix over all channels between memory and output layer; shared: one factor a channel."""
    causal: bool = False
    """Chunks after the own one are not seen, neither by softmax nor by the memory; anchors are none then."""

    def __post_init__(self) -> None:
        check_number("chunk", self.chunk, 1, 4096, whole=True)
        check_number("radius", self.radius, 0, 4096, whole=True)
        check_choice("anchors", self.anchors, ("none", "first", "both"))
        check_choice("output", self.output, ("full", "shared"))
        for name in ("conv", "scale_memory", "causal"):
            check_choice(name, getattr(self, name), (True, False))
        if self.causal and self.anchors != "none":
            raise UserError("causal=True needs anchors='none': a dense frame sees what comes later")
