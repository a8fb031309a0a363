"""Tiny U-Nets."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.tiny_parts import CHANNELS, TEXT_DIM, Built, Size, builder


def config(kind: str, **changes: Any) -> dict[str, Any]:
    """Return the config of a U-Net with two down blocks, the second with cross-attention, and two up blocks.

    Args:
        kind: suffix of the names of the block classes.
        changes: further config entries.
    """
    shared = {
        "in_channels": CHANNELS, "out_channels": CHANNELS, "layers_per_block": 1, "block_out_channels": (8, 8),
        "down_block_types": (f"DownBlock{kind}", f"CrossAttnDownBlock{kind}"), "norm_num_groups": 4,
        "up_block_types": (f"CrossAttnUpBlock{kind}", f"UpBlock{kind}"), "cross_attention_dim": TEXT_DIM,
    }  # fmt: skip
    return {**shared, **changes}


def arguments(size: Size, **changes: Any) -> dict[str, Any]:
    """Return forward arguments: a clip, a timestep and a text."""
    sample = torch.randn(size.batch, CHANNELS, size.frames, 8, 8)
    return {"sample": sample, "timestep": size.timestep().long(), "encoder_hidden_states": size.text(), **changes}


@builder("Stable Diffusion", video=False)
def stable_diffusion(size: Size) -> Built:
    from diffusers import UNet2DConditionModel

    picture = torch.randn(size.batch, CHANNELS, 8, 8)
    return UNet2DConditionModel, config("2D", attention_head_dim=2), arguments(size, sample=picture)


@builder("AnimateDiff", video=False)
def animatediff(size: Size) -> Built:
    from diffusers import UNetMotionModel

    heads = {"num_attention_heads": 2, "motion_num_attention_heads": 2}
    text = size.text().repeat_interleave(size.frames, dim=0)  # one text per frame
    return UNetMotionModel, config("Motion", **heads), arguments(size, encoder_hidden_states=text)


@builder("ModelScope", video=False)
def modelscope(size: Size) -> Built:
    from diffusers import UNet3DConditionModel

    return UNet3DConditionModel, config("3D", attention_head_dim=4), arguments(size)


@builder("I2VGen-XL", video=False)
def i2vgen(size: Size) -> Built:
    from diffusers import I2VGenXLUNet

    given = arguments(size, fps=torch.full((size.batch,), 8), image_embeddings=torch.randn(size.batch, TEXT_DIM))
    # The class has 4 channels, whatever its config has.
    given["sample"] = torch.randn(size.batch, 4, size.frames, 8, 8)
    given["image_latents"] = torch.randn_like(given["sample"])
    return I2VGenXLUNet, config("3D", in_channels=4, out_channels=4, attention_head_dim=4), given


@builder("Stable Video Diffusion", video=False)
def stable_video_diffusion(size: Size) -> Built:
    from diffusers import UNetSpatioTemporalConditionModel

    made = config(
        "SpatioTemporal", num_attention_heads=(2, 2), addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12, num_frames=size.frames,
    )  # fmt: skip
    del made["norm_num_groups"]
    # Norms of this class always have 32 groups of channels.
    made["block_out_channels"] = (32, 32)
    given = arguments(size, added_time_ids=torch.rand(size.batch, 3))
    given["sample"] = given["sample"].transpose(1, 2)
    return UNetSpatioTemporalConditionModel, made, given
