"""Parts that tiny pipelines share, each built once, and what every tiny call has in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from tests.families.tiny_parts import Size, build
from tests.tiny_wan import TEXT_DIM, byte_tokenizer, wan_components

SIZE = Size(batch=1, frames=3, layers=2)
"""For the configurations of transformers; a call has the frames it says."""

Tiny = tuple[dict[str, Any], dict[str, Any]]
"""Components, and arguments of a call that takes well under a second."""

TINY: dict[str, Callable[[], Tiny]] = {}
"""Pipeline class -> builder of a tiny one."""


def tiny(name: str) -> Callable[[Callable[[], Tiny]], Callable[[], Tiny]]:
    """Enter a builder into the table."""

    def enter(build: Callable[[], Tiny]) -> Callable[[], Tiny]:
        TINY[name] = build
        return build

    return enter


def image(height: int = 16, width: int = 32) -> Image.Image:
    """A picture that is not one colour."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows * 7, columns * 5, rows + columns], -1).astype(np.uint8))


def video(frames: int = 9, height: int = 16, width: int = 32) -> list[Image.Image]:
    """A clip of pictures."""
    return [image(height, width).rotate(20 * number) for number in range(frames)]


def call(**changes: Any) -> dict[str, Any]:
    """Two steps of a clip of 9 frames of 16 x 32, as a tensor of latents."""
    arguments = {
        "prompt": "a ball",
        "height": 16,
        "width": 32,
        "num_frames": 9,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "output_type": "latent",
    }
    return {name: value for name, value in {**arguments, **changes}.items() if value is not None}


@functools.cache
def wan_parts() -> dict[str, Any]:
    """Tokenizer, text encoder, autoencoder (8x smaller, 4 frames a latent, 4 channels), scheduler."""
    from diffusers import AutoencoderKLWan

    # Without patches in the autoencoder, which only Wan 2.2's pipelines count.
    config = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    statistics = {"latents_mean": [0.1, -0.2, 0.3, -0.4], "latents_std": [0.5, 1.5, 2.0, 0.8]}
    return {**wan_components(), "vae": build(AutoencoderKLWan, {**config, "z_dim": 4, **statistics})}


@functools.cache
def clip_vision() -> dict[str, Any]:
    """Image encoder of 8 channels and the processor of its pictures."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 8, "intermediate_size": 8, "projection_dim": 8, "image_size": 8, "patch_size": 4}
    config = CLIPVisionConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    processor = CLIPImageProcessorPil(size=8, crop_size=8)
    return {"image_encoder": build(CLIPVisionModelWithProjection, {"config": config}), "image_processor": processor}


@functools.cache
def t5_parts() -> dict[str, Any]:
    """Tokenizer and T5."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=400, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return {"tokenizer": byte_tokenizer(), "text_encoder": build(T5EncoderModel, {"config": config})}
