"""What a method must know of a transformer class: one frozen row per class, of parts that not every class has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from postgen.families.blocks import Blocks
from postgen.families.video_tokens import VideoTokens

if TYPE_CHECKING:
    from torch import nn

TimestepShape = Literal["B", "BT", "B1T11", "BL"]
"""One timestep per sample (B,), per latent frame (B, T) or (B, 1, T, 1, 1), or per token (B, T*H*W)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One row. Every class has blocks; what else methods need is a part of its own, missing where a class has none."""

    transformer: str
    """Class name in diffusers (or of the third party that registers the row); UNets count."""
    blocks: Blocks
    """The repeated blocks, in the order in which they run."""
    timestep_shapes: tuple[TimestepShape, ...] = ("B",)
    """Shapes of `timestep` that forward accepts."""
    video: VideoTokens | None = None
    """Where the tokens of a video are inside self-attention; None: no softmax over its frames.
    Ask `postgen.families.video_tokens_of`, which says why."""

    def block_modules(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """Return the repeated blocks by name, in the order in which they run.

        Raises:
            UserError: none matches; the model's structure is not what the row says.
        """
        return {block.name: block.module for block in self.blocks.find(transformer)}
