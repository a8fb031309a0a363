"""Options of the layer types. A converted model stores them in its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from postgen.errors import SettingError, UserError, check_number, is_whole, shown

LINEAR_TYPES = ("lit", "mhla", "anchor", "chunk", "window_delta", "window_linear")
"""Layer types to which the attention of a block can be converted."""
OF_FRAMES = ("chunk", "window_delta", "window_linear")
"""Layer types that split a clip by frames. An image has a single frame, on which they equal softmax."""
TYPES = ("softmax", *LINEAR_TYPES)
"""All layer types; softmax is the unchanged attention of the base model."""


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Check that a setting has one of the allowed values.

    Raises:
        UserError: another value.
    """
    if not any(value is each or (isinstance(value, str) and value == each) for each in allowed):
        raise SettingError(name, f" must be one of {', '.join(map(str, allowed))}, got {shown(value)}")


def check_taps(name: str, value: Any) -> None:
    """Check that the size of a convolution is 0 (none) or an odd number up to 31.

    Raises:
        UserError: another value.
    """
    if not is_whole(value, 0, 31) or (value and value % 2 == 0):
        raise UserError(f"{name} must be 0 for none or an odd number up to 31, got {name}={shown(value)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LitOptions:
    """Options of the layer type `lit`: one linear state for the whole clip (arXiv:2501.12976)."""

    feature_map: str = "relu"
    """relu, or elu for elu(x) + 1."""
    center_keys: bool = True
    """Subtract the mean over the video's tokens from the keys before the feature map (arXiv:2605.02772)."""
    conv_space: int = 5
    """Side of the depth-wise convolution of the values within each frame, odd; 0 for none (guideline 1)."""
    conv_time: int = 3
    """Length of the depth-wise convolution of the values along time, odd; 0 for none."""
    conv_init: str = "zero"
    """zero: a new convolution adds nothing; default: the initialisation that torch gives a convolution."""
    merge_heads: int = 1
    """Number of neighbouring heads that are merged into one (guideline 2)."""
    causal: bool = False
    """Whether a frame attends to itself and earlier frames only; needs `center_keys=False`."""
    eps: float = 1e-15
    """Small number that is added to the divisor."""

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
            raise UserError(
                "causal=True needs center_keys=False, because the mean over the keys of the whole clip includes later"
                " frames"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MhlaOptions:
    """Options of the layer type `mhla`: states of blocks of tokens, mixed with learned weights (arXiv:2601.07832)."""

    blocks: tuple[int, int, int] = (1, 4, 4)
    """Number of blocks along frames, rows and columns, on the grid for which the layer is created."""
    divisor: bool = True
    """False replaces the divisor by a mean over the keys, as the paper does for video. Attention that also contains
    text always has a divisor, because the softmax over the text has one."""
    interpolate: bool = True
    """True: on another grid the blocks keep their size, and the mixing weights are interpolated. False: other grids
    are refused."""
    feature_map: str = "relu"
    """See `LitOptions.feature_map`."""
    center_keys: bool = True
    """See `LitOptions.center_keys`."""
    conv_space: int = 0
    """See `LitOptions.conv_space`. The paper finds that a convolution hurts large models."""
    conv_time: int = 0
    """See `LitOptions.conv_time`."""
    conv_init: str = "zero"
    """See `LitOptions.conv_init`."""
    eps: float = 1e-15
    """See `LitOptions.eps`."""

    def __post_init__(self) -> None:
        given = self.blocks
        if not isinstance(given, tuple | list) or len(given) != 3 or not all(is_whole(n, 1, 1024) for n in given):
            raise UserError(
                f"blocks must be three whole numbers from 1 to 1024 (frames, rows, columns), got {shown(given)}"
            )
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
    """Options of the layer type `anchor`: softmax over every R-th token, linear attention over the rest
    (arXiv:2509.24899)."""

    every: int = 4
    """R, from 1 on; with 1 the layer computes softmax attention."""
    feature_map: str = "learned"
    """learned: a small network per head, with the two halves of its output raised to the powers 1 and 2; relu and elu:
    see `LitOptions.feature_map`."""

    def __post_init__(self) -> None:
        check_number("every", self.every, 1, 4096, whole=True)
        check_choice("feature_map", self.feature_map, ("learned", "relu", "elu"))


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkOptions:
    """Options of the layer type `chunk`: softmax within a chunk of frames, linear attention over the other frames
    (arXiv:2601.04342)."""

    frames: int = 3
    """Tc, latent frames per chunk."""
    overlap: int = 1
    """To, number of frames before the chunk over which its queries also use softmax."""
    causal: bool = False
    """True: queries do not attend to frames after their chunk, as in the paper. False: these frames belong to the
    linear part."""
    feature_map: str = "learned"
    """See `AnchorOptions.feature_map`."""

    def __post_init__(self) -> None:
        check_number("frames", self.frames, 1, 4096, whole=True)
        check_number("overlap", self.overlap, 0, 4096, whole=True)
        check_choice("causal", self.causal, (True, False))
        check_choice("feature_map", self.feature_map, ("learned", "relu", "elu"))


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowOptions:
    """Options of the layer types `window_delta` and `window_linear`: softmax in a window of frames, plus a memory of
    the other frames (arXiv:2609.20744)."""

    chunk: int = 1
    """Latent frames per chunk; the frames of a chunk share one window."""
    radius: int = 2
    """Number of chunks before and after a chunk that belong to its window."""
    anchors: str = "none"
    """Dense frames: none, first (the first frame) or both (the first and the last frame). A dense frame attends to all
    frames, all frames attend to it, and it is not written to the memory."""
    conv: bool = True
    """Whether the memory's keys and values pass through depth-wise convolutions, 5 x 5 in space and 5 in time."""
    scale_memory: bool = True
    """Whether the memory's keys are scaled by sqrt(min(1, D / S)), with S tokens per frame. Without the scale, a frame
    of many tokens erases what earlier frames wrote."""
    output: str = "full"
    """Map from the memory to the output projection. full: matrix over all channels; shared: one factor per channel."""
    causal: bool = False
    """True: queries do not see later chunks, neither by softmax nor through the memory; needs `anchors="none"`."""

    def __post_init__(self) -> None:
        check_number("chunk", self.chunk, 1, 4096, whole=True)
        check_number("radius", self.radius, 0, 4096, whole=True)
        check_choice("anchors", self.anchors, ("none", "first", "both"))
        check_choice("output", self.output, ("full", "shared"))
        for name in ("conv", "scale_memory", "causal"):
            check_choice(name, getattr(self, name), (True, False))
        if self.causal and self.anchors != "none":
            raise UserError("causal=True needs anchors='none', because a dense frame attends to later frames")
