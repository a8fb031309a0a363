"""Tiny random transformers of every family, each with valid arguments of its forward: real classes, no download.

    tiny = tiny_model("CogVideoX 1.5", batch=2)
    tiny.transformer(**tiny.arguments)

Every clip has `frames` token frames of 2 x 3 tokens, so height and width cannot be mixed up unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ROWS, COLUMNS = 2, 3
"""Tokens per frame, down and across."""
HEADS, HEAD_DIM = 2, 16
INNER = HEADS * HEAD_DIM
TEXT_TOKENS, TEXT_DIM = 5, 16
CHANNELS = 4


@dataclass(kw_only=True)
class TinyModel:
    """A transformer in eval mode and the keyword arguments of one forward call."""

    name: str
    transformer: nn.Module
    arguments: dict[str, Any]
    frames: int
    """Token frames of the clip in `arguments`."""

    @torch.no_grad()
    def __call__(self, **changes: Any) -> Tensor:
        """Run the transformer on its arguments; returns the prediction of the video."""
        output: Any = self.transformer(**{**self.arguments, **changes}, return_dict=False)[0]
        return torch.stack(output) if isinstance(output, list) else output


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is asked of a builder."""

    batch: int
    frames: int
    layers: int
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", self.frames * ROWS * COLUMNS)

    def latents(self, channels: int = CHANNELS, patch: int = 2, patch_t: int = 1) -> Tensor:
        """(B, C, T, H, W)"""
        return torch.randn(self.batch, channels, self.frames * patch_t, ROWS * patch, COLUMNS * patch)

    def text(self, width: int = TEXT_DIM, tokens: int = TEXT_TOKENS) -> Tensor:
        return torch.randn(self.batch, tokens, width)

    def text_mask(self, dtype: torch.dtype = torch.int64) -> Tensor:
        """The last token of every text is padding."""
        mask = torch.ones(self.batch, TEXT_TOKENS, dtype=dtype)
        mask[:, -1] = 0
        return mask

    def timestep(self, value: float = 500.0) -> Tensor:
        return torch.full((self.batch,), value)

    def rotary(self, dim: int = HEAD_DIM) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T*H*W, dim) of angles that come in pairs."""
        angles = torch.rand(self.tokens, dim // 2).repeat_interleave(2, dim=1)
        return angles.cos(), angles.sin()


Built = tuple[type[nn.Module], dict[str, Any], dict[str, Any]]
"""Class, configuration, arguments of forward."""

BUILDERS: dict[str, Callable[[Size], Built]] = {}


def builder(name: str) -> Callable[[Callable[[Size], Built]], Callable[[Size], Built]]:
    """Enter a function into the table."""

    def enter(function: Callable[[Size], Built]) -> Callable[[Size], Built]:
        BUILDERS[name] = function
        return function

    return enter


def tiny_model(name: str, *, batch: int = 1, frames: int = 3, layers: int = 2, seed: int = 0) -> TinyModel:
    """Build one of `BUILDERS` with random weights; weights that start at zero are drawn too, or nothing would show."""
    torch.manual_seed(seed)
    kind, config, arguments = BUILDERS[name](Size(batch=batch, frames=frames, layers=layers))
    transformer = kind(**config).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return TinyModel(name=name, transformer=transformer, arguments=arguments, frames=frames)


def wan_config(size: Size, **changes: Any) -> dict[str, Any]:
    """Configuration that Wan and its relatives share."""
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
    """Arguments that Wan and its relatives share."""
    arguments = {
        "hidden_states": size.latents(),
        "timestep": size.timestep(),
        "encoder_hidden_states": size.text(),
    }
    return {**arguments, **changes}


@builder("Wan")
def wan(size: Size) -> Built:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel, wan_config(size), wan_arguments(size)


@builder("Wan image-to-video")
def wan_image(size: Size) -> Built:
    from diffusers import WanTransformer3DModel

    config = wan_config(size, in_channels=2 * CHANNELS + 4, image_dim=8, added_kv_proj_dim=INNER)
    image = torch.randn(size.batch, 5, 8)
    latents = size.latents(2 * CHANNELS + 4)
    return WanTransformer3DModel, config, wan_arguments(size, hidden_states=latents, encoder_hidden_states_image=image)


@builder("Wan 2.2 text-and-image-to-video")
def wan_per_token(size: Size) -> Built:
    from diffusers import WanTransformer3DModel

    timestep = torch.full((size.batch, size.tokens), 500.0)
    timestep[:, : ROWS * COLUMNS] = 0  # the first frame is the given image
    return WanTransformer3DModel, wan_config(size), wan_arguments(size, timestep=timestep)


def cogvideox_config(size: Size, **changes: Any) -> dict[str, Any]:
    """Configuration that CogVideoX and ConsisID share."""
    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": 8,
        "text_embed_dim": TEXT_DIM,
        "num_layers": size.layers,
        "sample_width": COLUMNS * 2,
        "sample_height": ROWS * 2,
        "sample_frames": 9,
        "max_text_seq_length": TEXT_TOKENS,
    }
    return {**config, **changes}


@builder("CogVideoX 1.0")
def cogvideox(size: Size) -> Built:
    from diffusers import CogVideoXTransformer3DModel

    latents = size.latents().transpose(1, 2)
    return CogVideoXTransformer3DModel, cogvideox_config(size), wan_arguments(size, hidden_states=latents)


@builder("CogVideoX 1.5")
def cogvideox_15(size: Size) -> Built:
    from diffusers import CogVideoXTransformer3DModel

    config = cogvideox_config(size, patch_size_t=2, use_rotary_positional_embeddings=True, patch_bias=False)
    latents = size.latents(patch_t=2).transpose(1, 2)
    arguments = wan_arguments(size, hidden_states=latents, image_rotary_emb=size.rotary())
    return CogVideoXTransformer3DModel, config, arguments


def hunyuan_config(size: Size, **changes: Any) -> dict[str, Any]:
    """Configuration that HunyuanVideo and its relatives share."""
    config = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": size.layers,
        "num_single_layers": size.layers,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    }
    return {**config, **changes}


def hunyuan_arguments(size: Size, **changes: Any) -> dict[str, Any]:
    """Arguments that HunyuanVideo and its relatives share."""
    arguments = {
        **wan_arguments(size),
        "encoder_attention_mask": size.text_mask(),
        "pooled_projections": torch.randn(size.batch, 8),
        "guidance": torch.full((size.batch,), 6000.0),
    }
    return {**arguments, **changes}


@builder("HunyuanVideo")
def hunyuan(size: Size) -> Built:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel, hunyuan_config(size), hunyuan_arguments(size)


@builder("LTX")
def ltx(size: Size) -> Built:
    from diffusers import LTXVideoTransformer3DModel

    config = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "cross_attention_dim": INNER,
        "num_layers": size.layers,
        "caption_channels": TEXT_DIM,
    }
    arguments = {
        "hidden_states": torch.randn(size.batch, size.tokens, CHANNELS),
        "encoder_hidden_states": size.text(),
        "timestep": size.timestep(),
        "encoder_attention_mask": size.text_mask(),
        "num_frames": size.frames,
        "height": ROWS,
        "width": COLUMNS,
        "rope_interpolation_scale": (0.32, 32, 32),
    }
    return LTXVideoTransformer3DModel, config, arguments
