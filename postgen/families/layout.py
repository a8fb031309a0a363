"""What a method must know of a transformer class: one frozen row per class, of parts that not every class has."""

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
"""One timestep per sample (B,), per latent frame (B, T) or (B, 1, T, 1, 1), or per token (B, T*H*W)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """How a transformer class is called: latents, timestep, the encoding of a text, and the rest."""

    extras: str | Extras = "nothing"
    """`extras(config, size)` gives the rest by name; or the name of a function of `families.call_extras`."""
    text_tokens: int = 512
    """Tokens of a prompt that the pipeline pads to by default."""
    text_width: str | None = "text_dim"
    """Field of the config that tells the width of the text; None: it takes no text."""
    time: int = 4
    """Frames that its autoencoder puts into a latent frame; 1 for pictures."""
    space: int = 8
    """Pixels a side that its autoencoder puts into a latent pixel."""
    more_frames: int = 0
    """Latent frames of references that stand beside those of the clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One row. Every class has blocks; what else methods need is a part of its own, missing where a class has none.

    What needs torch is named as `module:NAME` and imported when it is asked for, so that the rows are light.
    """

    transformer: str
    """Class name in diffusers (or of the third party that registers the row); UNets count."""
    blocks: Blocks
    """The repeated blocks, in the order in which they run."""
    timestep_shapes: tuple[TimestepShape, ...] = ("B",)
    """Shapes of `timestep` that forward accepts."""
    video: VideoTokens | None = None
    """Where the tokens of a video are inside self-attention; None: no softmax over its frames.
    Ask `postgen.families.video_tokens_of`, which says why."""
    image: VideoTokens | None = None
    """Where the tokens of a picture are, of a class that makes pictures; None: it has not been described, or there is
    no softmax over them. Ask `postgen.families.tokens_of`, which also gives those of a video."""
    call: Call | None = None
    """How it is called, for counting and timing a forward; every row with tokens of a video or picture says it."""
    attention: str | AttentionAnatomy | None = None
    """How its self-attention is computed, or where that is. Ask `postgen.families.attention.attention_of`."""
    denoisers: Mapping[str, str | Callable[[Any], Denoiser]] = field(default_factory=dict)
    """What makes the denoiser of a pipeline, or where that is, by the name of the pipeline's class.
    Ask `postgen.families.denoiser_for`."""

    def block_modules(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """Return the repeated blocks by name, in the order in which they run.

        Raises:
            UserError: none matches; the model's structure is not what the row says.
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
    """Return the row of a video transformer whose tokens are as usual but for some changes."""
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
    """Return what a row names as `module:NAME`, importing the module; what is no text is returned as it is."""
    if not isinstance(place, str):
        return place
    module, name = place.split(":")
    return getattr(import_module(module), name)
