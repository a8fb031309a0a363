"""Tiny pipelines of LTX-2: video and audio."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.families.tiny_parts import INNER, TEXT_DIM, TEXT_TOKENS, build
from tests.pipelines.others import CHANNELS, embeddings, transformer
from tests.pipelines.parts import Tiny, call, image, tiny, video

SIZE = {"height": 32, "width": 32}


@functools.cache
def autoencoders() -> dict[str, Any]:
    """Of the video (4x smaller, 4 frames a latent) and of the audio, and what makes sound of the latter's output."""
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    scaling = {"spatio_temporal_scaling": (True, True), "downsample_type": ("spatiotemporal",) * 2}
    encoder = {"block_out_channels": (8, 8), "layers_per_block": (1, 1, 1)}
    decoder = {"decoder_block_out_channels": (8, 8), "decoder_layers_per_block": (1, 1, 1)}
    decoder |= {"decoder_spatio_temporal_scaling": (True, True), "decoder_inject_noise": (False,) * 3}
    plain = {"upsample_residual": (False,) * 2, "upsample_factor": (1,) * 2, "patch_size": 1, "patch_size_t": 1}
    config = {**scaling, **encoder, **decoder, **plain, "latent_channels": CHANNELS}
    audio = {"base_channels": 4, "ch_mult": (1,), "num_res_blocks": 1, "latent_channels": 2, "mel_bins": 8}
    audio |= {"attn_resolutions": None, "resolution": 32, "mid_block_add_attention": False}
    vocoder = {"in_channels": 16, "hidden_channels": 8, "upsample_kernel_sizes": [4, 4], "upsample_factors": [2, 2]}
    vocoder |= {"resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3, 5]]}
    return {
        "vae": build(AutoencoderKLLTX2Video, config),
        "audio_vae": build(AutoencoderKLLTX2Audio, audio),
        "vocoder": build(LTX2Vocoder, vocoder),
    }


@functools.cache
def connectors() -> Any:
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    config: dict[str, Any] = {"caption_channels": TEXT_DIM, "text_proj_in_factor": 1}
    for stream in ("video", "audio"):
        sizes = {"num_attention_heads": 2, "attention_head_dim": TEXT_DIM // 2, "num_layers": 1}
        sizes |= {"num_learnable_registers": None}
        config |= {f"{stream}_connector_{name}": value for name, value in sizes.items()}
    return build(LTX2TextConnectors, config)


def parts(**more: Any) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    made = {**autoencoders(), "connectors": connectors(), "transformer": transformer("LTX-2", **AUDIO)}
    texts = dict.fromkeys(("text_encoder", "tokenizer"))
    return {**made, **texts, "scheduler": FlowMatchEulerDiscreteScheduler(), **more}


AUDIO = {"audio_in_channels": 4, "audio_out_channels": 4, "audio_cross_attention_dim": INNER}


def texts() -> dict[str, torch.Tensor]:
    return embeddings(prompt_embeds=(1, TEXT_TOKENS, TEXT_DIM), prompt_attention_mask=(1, TEXT_TOKENS))


def simple(**changes: Any) -> dict[str, Any]:
    """Guidance alone: the other guidances skip layers that a tiny model does not have."""
    plain = {"stg_scale": 0.0, "modality_scale": 1.0, "audio_stg_scale": 0.0, "audio_modality_scale": 1.0}
    return call(prompt=None, **SIZE, **plain, **texts(), **{"spatio_temporal_guidance_blocks": [1], **changes})


@tiny("LTX2Pipeline")
def ltx2() -> Tiny:
    return parts(), simple()


@tiny("LTX2ImageToVideoPipeline")
def ltx2_image() -> Tiny:
    return parts(), simple(image=image(), image_crf=0)


@tiny("LTX2ConditionPipeline")
def ltx2_condition() -> Tiny:
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    return parts(), simple(conditions=[LTX2VideoCondition(frames=image(), index=0, strength=1.0, crf=0)])


@tiny("LTX2InContextPipeline")
def ltx2_context() -> Tiny:
    from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

    return parts(), simple(reference_conditions=[LTX2ReferenceCondition(frames=video(), strength=1.0)])


@tiny("LTX2HDRPipeline")
def ltx2_hdr() -> Tiny:
    from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition

    clip = [LTX2HDRReferenceCondition(frames=video(), strength=1.0)]
    return parts(), call(prompt=None, **SIZE, guidance_scale=1.0, reference_conditions=clip, **texts())


@tiny("LTX2DFRPipeline")
def ltx2_frame_rate() -> Tiny:
    arguments = call(prompt=None, **SIZE, guidance_scale=None, num_inference_steps=None, sigmas=[1.0, 0.5], **texts())
    slots = transformer("LTX-2", **AUDIO, use_keyframes_abs_pos_embedding=True)
    return parts(transformer=slots), {
        name: value for name, value in arguments.items() if not name.startswith("negative")
    }
