"""Shared parts of the builders of tiny models: sizes, random arguments, and the tables of builders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROWS, COLUMNS = 2, 3
"""Rows and columns of tokens in a frame."""
HEADS, HEAD_DIM = 2, 16
INNER = HEADS * HEAD_DIM
TEXT_TOKENS, TEXT_DIM = 5, 16
CHANNELS = 5
"""Different from the number of frames, so that a test fails if code exchanges the two axes."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Requested size of a tiny model's arguments, with random tensors of that size."""

    batch: int
    frames: int
    layers: int
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", self.frames * ROWS * COLUMNS)

    def latents(self, channels: int = CHANNELS, patch: int = 2, patch_t: int = 1) -> Tensor:
        """Return latents (B, C, T, H, W)."""
        return torch.randn(self.batch, channels, self.frames * patch_t, ROWS * patch, COLUMNS * patch)

    def text(self, width: int = TEXT_DIM, tokens: int = TEXT_TOKENS) -> Tensor:
        return torch.randn(self.batch, tokens, width)

    def text_mask(self, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return a mask (B, L) in which the last token of every text is padding."""
        mask = torch.ones(self.batch, TEXT_TOKENS, dtype=dtype)
        mask[:, -1] = 0
        return mask

    def timestep(self, value: float = 500.0) -> Tensor:
        return torch.full((self.batch,), value)

    def rotary(self, dim: int = HEAD_DIM) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (T*H*W, dim); every angle occurs twice in a row."""
        angles = torch.rand(self.tokens, dim // 2).repeat_interleave(2, dim=1)
        return angles.cos(), angles.sin()


Built = tuple[Any, dict[str, Any], dict[str, Any]]
"""Class, config and forward arguments of a tiny model."""

BUILDERS: dict[str, Callable[[Size], Built]] = {}
"""Builders of models with softmax attention over the frames of a video, by name."""

BLOCK_BUILDERS: dict[str, Callable[[Size], Built]] = {}
"""Builders of models without video tokens, by name: image models, U-Nets, models with other attention."""


def builder(name: str, *, video: bool = True) -> Callable[[Callable[[Size], Built]], Callable[[Size], Built]]:
    """Return a decorator that adds a builder to one of the tables."""

    def enter(function: Callable[[Size], Built]) -> Callable[[Size], Built]:
        (BUILDERS if video else BLOCK_BUILDERS)[name] = function
        return function

    return enter


def build(kind: Any, config: dict[str, Any], seed: int = 0) -> Any:
    """Build a module with random weights that depend on the seed only.

    Weights that a class initialises to zero are random too, because zeros would hide the effect of earlier layers.
    """
    torch.manual_seed(seed)
    module = kind(**config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return module


def wan_config(size: Size, **changes: Any) -> dict[str, Any]:
    """Return config entries that Wan and classes derived from it share."""
    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": size.layers,
        "rope_max_seq_len": 32,
    }
    return {**config, **changes}


def wan_arguments(size: Size, **changes: Any) -> dict[str, Any]:
    """Return forward arguments that Wan and classes derived from it share."""
    arguments = {
        "hidden_states": size.latents(),
        "timestep": size.timestep(),
        "encoder_hidden_states": size.text(),
    }
    return {**arguments, **changes}
