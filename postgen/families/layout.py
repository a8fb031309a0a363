"""What a method must know about a transformer class: one frozen `Layout` per class, with some optional parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from postgen.families.blocks import Blocks
from postgen.families.video_tokens import VideoTokens

if TYPE_CHECKING:
    from torch import nn

    from postgen.families.attention.registry import AttentionAnatomy
    from postgen.families.call_extras import Extras
    from postgen.families.denoiser import Denoiser

TimestepShape = Literal["B", "BT", "B1T11", "BL"]
"""Shape of `timestep`: one per sample (B,), per latent frame (B, T) or (B, 1, T, 1, 1), or per token (B, T*H*W)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """The forward arguments of a transformer class: latents, timestep, text embeddings, and the extra arguments."""

    extras: str | Extras = "nothing"
    """Function `extras(config, size)` that returns the extra arguments by name, or the name of such a function in
    `families.call_extras`."""
    text_tokens: int = 512
    """Number of text tokens that the pipeline pads to by default."""
    text_width: str | None = "text_dim"
    """Field of the transformer's config with the width of the text embeddings; None: the class takes no text."""
    time: int = 4
    """Frames per latent frame in the autoencoder; 1 for pictures."""
    space: int = 8
    """Pixels per latent pixel in the autoencoder, along one side."""
    more_frames: int = 0
    """Latent frames of reference pictures, in addition to those of the clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The description of one transformer class. Every class has blocks; the other parts are None where it has none.

    Objects that need torch are given as text, `module:NAME`, and imported on first use, so that importing the layouts
    stays fast.
    """

    transformer: str
    """Class name of the transformer or UNet, in diffusers or in the package that registers the layout."""
    blocks: Blocks
    """The repeated blocks, in the order in which they run."""
    timestep_shapes: tuple[TimestepShape, ...] = ("B",)
    """Shapes of `timestep` that the forward method accepts."""
    video: VideoTokens | None = None
    """Positions of the video tokens in self-attention; None: no softmax attention runs over the frames.
    Call `postgen.families.video_tokens_of` to get them, or an error that gives the reason."""
    image: VideoTokens | None = None
    """Positions of the tokens of a picture, for a class that makes pictures; None: there is no description of them, or
    no softmax attention over them. Call `postgen.families.tokens_of`, which returns video tokens as well."""
    call: Call | None = None
    """The forward arguments, to count and time a forward pass. Every layout with `video` or `image` has them."""
    attention: str | AttentionAnatomy | None = None
    """The computation of self-attention, or its place as `module:NAME`. Call
    `postgen.families.attention.attention_of`."""
    denoisers: Mapping[str, str | Callable[[Any], Denoiser]] = field(default_factory=dict)
    """Pipeline class name -> the function that makes its denoiser, or the function's place as `module:NAME`.
    Call `postgen.families.denoiser_for`."""

    def block_modules(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """Return the repeated blocks by module name, in the order in which they run.

        Raises:
            UserError: no module matches, because the structure of the model differs from this layout.
        """
        return {block.name: block.module for block in self.blocks.find(transformer)}


def video_row(
    usual: VideoTokens,
    transformer: str,
    blocks: Blocks,
    call: Call,
    *,
    timestep_shapes: tuple[TimestepShape, ...] = ("B",),
    attention: str | None = None,
    denoisers: Mapping[str, str] | None = None,
    **changes: Any,
) -> Layout:
    """Return the layout of a video transformer.

    Args:
        usual: video tokens of a similar class.
        transformer, blocks, call, timestep_shapes, attention, denoisers: fields of `Layout`.
        changes: fields of `VideoTokens` in which this class differs from `usual`.
    """
    return Layout(
        transformer=transformer,
        blocks=blocks,
        timestep_shapes=timestep_shapes,
        video=replace(usual, **changes),
        call=call,
        attention=attention,
        denoisers=denoisers or {},
    )


def found(place: Any) -> Any:
    """Import and return the object at `module:NAME`; return any other object than a text unchanged."""
    if not isinstance(place, str):
        return place
    module, name = place.split(":")
    return getattr(import_module(module), name)
