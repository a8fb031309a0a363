"""Tiny transformers of every family with random weights and valid forward arguments: real classes, no downloads.

    tiny = tiny_model("CogVideoX 1.5", batch=2)
    tiny.transformer(**tiny.arguments)

Every clip has `frames` token frames of 2 x 3 tokens, so that a test fails if code exchanges height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# The import of these modules adds their builders to the tables.
from tests.families import tiny_images, tiny_others, tiny_unets, tiny_wan  # noqa: F401
from tests.families.tiny_parts import BLOCK_BUILDERS, BUILDERS, Size, build

__all__ = ["BLOCK_BUILDERS", "BUILDERS", "IMAGES", "TinyModel", "tiny_model"]

IMAGES = ("Chroma", "DiT", "Flux", "PixArt", "Stable Diffusion 3")
"""Models of `BLOCK_BUILDERS` whose layout describes the tokens of their picture."""


@dataclass(kw_only=True)
class TinyModel:
    """A transformer in eval mode and the keyword arguments of one forward pass."""

    name: str
    transformer: nn.Module
    arguments: dict[str, Any]
    frames: int
    """Token frames of the clip in `arguments`."""
    attention_layers: int
    """Number of self-attention layers over the video or picture: one per block, two in dual blocks of SD 3.5."""

    @torch.no_grad()
    def __call__(self, **changes: Any) -> Tensor:
        """Run the transformer on its arguments, with changes, and return the prediction of the video or picture."""
        output: Any = self.transformer(**{**self.arguments, **changes}, return_dict=False)
        # Kandinsky 5 returns the bare tensor.
        prediction = output[0] if isinstance(output, tuple) else output
        # Z-Image returns a list of images.
        return torch.stack(prediction) if isinstance(prediction, list) else prediction


def tiny_model(name: str, *, batch: int = 1, frames: int = 4, layers: int = 2, seed: int = 0) -> TinyModel:
    """Build one of `BUILDERS` or `BLOCK_BUILDERS` with random weights."""
    torch.manual_seed(seed)
    kind, config, arguments = {**BUILDERS, **BLOCK_BUILDERS}[name](Size(batch=batch, frames=frames, layers=layers))
    transformer = build(kind, config, seed)
    blocks = config.get("num_visual_blocks", config.get("num_layers", 0)) + config.get("num_single_layers", 0)
    found = blocks + len(config.get("dual_attention_layers", ()))
    return TinyModel(name=name, transformer=transformer, arguments=arguments, frames=frames, attention_layers=found)
