"""Tiny random transformers of every family, each with valid arguments of its forward: real classes, no download.

    tiny = tiny_model("CogVideoX 1.5", batch=2)
    tiny.transformer(**tiny.arguments)

Every clip has `frames` token frames of 2 x 3 tokens, so height and width cannot be mixed up unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# They enter their builders into the tables when they are imported.
from tests.families import tiny_images, tiny_others, tiny_unets, tiny_wan  # noqa: F401
from tests.families.tiny_parts import BLOCK_BUILDERS, BUILDERS, Size, build

__all__ = ["BLOCK_BUILDERS", "BUILDERS", "IMAGES", "TinyModel", "tiny_model"]

IMAGES = ("Chroma", "DiT", "Flux", "PixArt", "Stable Diffusion 3")
"""Those of `BLOCK_BUILDERS` of which it is known where the tokens of their picture are."""


@dataclass(kw_only=True)
class TinyModel:
    """A transformer in eval mode and the keyword arguments of one forward call."""

    name: str
    transformer: nn.Module
    arguments: dict[str, Any]
    frames: int
    """Token frames of the clip in `arguments`."""
    attention_layers: int
    """Layers of self-attention over the video or picture that the configuration asks for: one a block, and one more in
    dual blocks of Stable Diffusion 3.5."""

    @torch.no_grad()
    def __call__(self, **changes: Any) -> Tensor:
        """Run the transformer on its arguments; returns the prediction of the video."""
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
