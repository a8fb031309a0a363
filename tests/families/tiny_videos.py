"""Tiny video pipelines of diffusers, one for each kind of call signature, saved to folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.families.tiny_parts import HEAD_DIM, HEADS
from tests.families.tiny_pipelines import POOLED, cogvideox, drawn, hunyuan_video, ltx, skyreels
from tests.tiny_wan import LATENT_CHANNELS, TEXT_DIM, wan_components


def _wan(**config: Any) -> Any:
    from diffusers import WanPipeline

    return WanPipeline(**wan_components(), **config)


def _wan_image() -> Any:
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline(**wan_components(in_channels=2 * LATENT_CHANNELS + 4))


def _cogvideox_image() -> Any:
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel

    parts = cogvideox().components
    config = {**parts["transformer"].config, "in_channels": 8}
    parts["transformer"] = CogVideoXTransformer3DModel.from_config(config).eval()
    return CogVideoXImageToVideoPipeline(**parts)


def _ltx_image() -> Any:
    from diffusers import LTXImageToVideoPipeline

    return LTXImageToVideoPipeline(**ltx().components)


def _ltx_conditions() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXConditionPipeline

    return LTXConditionPipeline(**{**ltx().components, "scheduler": FlowMatchEulerDiscreteScheduler()})


def _mochi() -> Any:
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

    parts = ltx().components
    vae = AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    transformer = MochiTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=2, pooled_projection_dim=8, in_channels=12,
        text_embed_dim=TEXT_DIM, time_embed_dim=8, max_sequence_length=16,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return MochiPipeline(scheduler, vae.eval(), parts["text_encoder"], parts["tokenizer"], transformer.eval())


def _stable_video() -> Any:
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), num_attention_heads=(2, 4),
        cross_attention_dim=POOLED, addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
    )  # fmt: skip
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2
    )
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224,
            patch_size=112, projection_dim=POOLED,
        )
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        timestep_type="continuous", sigma_min=0.002, sigma_max=700.0, use_karras_sigmas=True,
    )  # fmt: skip
    return StableVideoDiffusionPipeline(vae.eval(), encoder.eval(), unet.eval(), scheduler, CLIPImageProcessor())


VIDEOS: dict[str, Callable[[], Any]] = {
    "Wan": _wan,
    "Wan, first frame": _wan_image,
    "Wan, text or first frame": lambda: _wan(expand_timesteps=True),
    "CogVideoX": cogvideox,
    "CogVideoX, first frame": _cogvideox_image,
    "HunyuanVideo": hunyuan_video,
    "HunyuanVideo, not distilled": lambda: hunyuan_video(guidance_embeds=False),
    "LTX": ltx,
    "LTX, first frame": _ltx_image,
    "LTX, conditions": _ltx_conditions,
    "Mochi": _mochi,
    "SkyReels-V2": skyreels,
    "Stable Video Diffusion": _stable_video,
}
"""Functions that make the pipelines, by name."""


def save_tiny_video(name: str, folder: Path) -> Path:
    """Save one of `VIDEOS` to a folder. Zero weights are replaced by random ones, see `drawn`."""
    torch.manual_seed(0)
    drawn(VIDEOS[name]()).save_pretrained(folder)
    return folder
