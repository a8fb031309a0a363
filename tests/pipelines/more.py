"""Tiny pipelines that get the embeddings of the prompt: their text encoders are large language models."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.families.tiny_parts import TEXT_DIM, TEXT_TOKENS, build
from tests.pipelines.others import CHANNELS, embeddings, transformer
from tests.pipelines.parts import SIZE, Tiny, call, image, tiny, video, wan_parts
from tests.tiny_wan import byte_tokenizer

TEXT = (1, TEXT_TOKENS, TEXT_DIM)


def flow() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def without(*names: str) -> dict[str, None]:
    """Components that a call with embeddings needs not."""
    return dict.fromkeys(names)


@functools.cache
def hunyuan_vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    kinds = {"down_block_types": ("HunyuanVideoDownBlock3D",) * 4, "up_block_types": ("HunyuanVideoUpBlock3D",) * 4}
    sizes = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "latent_channels": CHANNELS, "norm_num_groups": 2}
    return build(AutoencoderKLHunyuanVideo, {**kinds, **sizes, "mid_block_add_attention": False})


@functools.cache
def hunyuan_text() -> dict[str, Any]:
    """Llama and CLIP with a tokenizer each."""
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    sizes = {"hidden_size": TEXT_DIM, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    llama = build(LlamaModel, {"config": LlamaConfig(vocab_size=400, **sizes)})
    clip = CLIPTextConfig(vocab_size=400, **{**sizes, "hidden_size": 8}, projection_dim=8, eos_token_id=1)
    made = {"text_encoder": llama, "text_encoder_2": build(CLIPTextModel, {"config": clip})}
    return {**made, "tokenizer": byte_tokenizer(), "tokenizer_2": byte_tokenizer()}


def hunyuan_parts(name: str = "HunyuanVideo", **changes: Any) -> dict[str, Any]:
    made = {"transformer": transformer(name, **changes), "vae": hunyuan_vae(), "scheduler": flow()}
    return {**made, **without("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}


def hunyuan_call(**changes: Any) -> dict[str, Any]:
    texts = embeddings(prompt_embeds=TEXT, pooled_prompt_embeds=(1, 8), prompt_attention_mask=TEXT[:2])
    return call(prompt=None, **{**texts, **changes})


@tiny("HunyuanVideoPipeline")
def hunyuan() -> Tiny:
    template = {"template": "{}", "crop_start": 0}
    return {**hunyuan_parts(), **hunyuan_text()}, call(prompt_template=template, max_sequence_length=8)


@tiny("HunyuanVideoImageToVideoPipeline")
def hunyuan_image() -> Tiny:
    made = hunyuan_parts(in_channels=2 * CHANNELS + 1, image_condition_type="latent_concat")
    return {**made, "image_processor": None}, hunyuan_call(image=image())


@tiny("HunyuanSkyreelsImageToVideoPipeline")
def hunyuan_skyreels() -> Tiny:
    return hunyuan_parts(in_channels=2 * CHANNELS), hunyuan_call(image=image())


@tiny("HunyuanVideoFramepackPipeline")
def framepack() -> Tiny:
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    config = SiglipVisionConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    encoder = build(SiglipVisionModel, {"config": config})
    made = {"image_encoder": encoder, "feature_extractor": SiglipImageProcessorPil(size={"height": 8, "width": 8})}
    return {**hunyuan_parts("HunyuanVideo Framepack"), **made}, hunyuan_call(image=image(), latent_window_size=3)


def hunyuan15_parts(**more: Any) -> dict[str, Any]:
    from diffusers import AutoencoderKLHunyuanVideo15, ClassifierFreeGuidance

    sizes = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "latent_channels": CHANNELS}
    vae = build(AutoencoderKLHunyuanVideo15, {**sizes, "spatial_compression_ratio": 8})
    made = {"transformer": transformer("HunyuanVideo 1.5", in_channels=2 * CHANNELS + 1, target_size=16), "vae": vae}
    texts = without("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return {**made, **texts, "scheduler": flow(), "guider": ClassifierFreeGuidance(guidance_scale=3.0), **more}


def hunyuan15_call(**changes: Any) -> dict[str, Any]:
    second = {"prompt_embeds_2": (1, 5, 12), "prompt_embeds_mask_2": (1, 5)}
    texts = embeddings(prompt_embeds=TEXT, prompt_embeds_mask=TEXT[:2], **second)
    return call(prompt=None, guidance_scale=None, **{**texts, **changes})


@tiny("HunyuanVideo15Pipeline")
def hunyuan15() -> Tiny:
    return hunyuan15_parts(), hunyuan15_call()


@tiny("HunyuanVideo15ImageToVideoPipeline")
def hunyuan15_image() -> Tiny:
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    config = SiglipVisionConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    encoder = build(SiglipVisionModel, {"config": config})
    made = {"image_encoder": encoder, "feature_extractor": SiglipImageProcessorPil(size={"height": 8, "width": 8})}
    return hunyuan15_parts(**made), hunyuan15_call(image=image(), height=None, width=None)


def kandinsky_parts(name: str, **changes: Any) -> dict[str, Any]:
    made = {"transformer": transformer(name, in_visual_dim=CHANNELS, out_visual_dim=CHANNELS, **changes)}
    texts = without("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return {**made, **texts, "vae": hunyuan_vae(), "scheduler": flow()}


def kandinsky5_call(**changes: Any) -> dict[str, Any]:
    texts = embeddings(prompt_embeds_qwen=TEXT, prompt_embeds_clip=(1, 8))
    lengths = torch.tensor([0, TEXT_TOKENS], dtype=torch.int32)
    texts |= {"prompt_cu_seqlens": lengths, "negative_prompt_cu_seqlens": lengths}
    return call(prompt=None, **{**texts, **changes})


@tiny("Kandinsky5T2VPipeline")
def kandinsky5() -> Tiny:
    return kandinsky_parts("Kandinsky 5"), kandinsky5_call()


@tiny("Kandinsky5I2VPipeline")
def kandinsky5_image() -> Tiny:
    return kandinsky_parts("Kandinsky 5", visual_cond=True), kandinsky5_call(image=image(), num_frames=33)


@tiny("Kandinsky6TI2VAPipeline")
def kandinsky6() -> Tiny:
    texts = embeddings(prompt_embeds=TEXT, pooled_prompt_embeds=(1, 8))
    return kandinsky_parts("Kandinsky 6"), call(prompt=None, sample_audio=False, **texts)


def motif_parts() -> dict[str, Any]:
    from diffusers import ClassifierFreeGuidance

    made = {"transformer": transformer("Motif", in_channels=2 * CHANNELS + 1, image_embed_dim=TEXT_DIM)}
    made |= {"vae": wan_parts()["vae"], "scheduler": flow(), "guider": ClassifierFreeGuidance(guidance_scale=3.0)}
    return {**made, **without("text_encoder", "tokenizer", "feature_extractor")}


@tiny("MotifVideoPipeline")
def motif() -> Tiny:
    texts = embeddings(prompt_embeds=TEXT, prompt_attention_mask=TEXT[:2])
    return motif_parts(), call(prompt=None, guidance_scale=None, **texts)


@functools.cache
def magvit() -> Any:
    from diffusers import AutoencoderKLMagvit

    kinds = {
        "down_block_types": ["SpatialDownBlock3D"] + ["SpatialTemporalDownBlock3D"] * 3,
        "up_block_types": ["SpatialUpBlock3D"] + ["SpatialTemporalUpBlock3D"] * 3,
    }
    sizes = {"block_out_channels": [8] * 4, "layers_per_block": 1, "latent_channels": CHANNELS, "norm_num_groups": 2}
    return build(AutoencoderKLMagvit, {**kinds, **sizes, "spatial_group_norm": False})


def easyanimate_parts(extra: int = 0) -> dict[str, Any]:
    made = {"transformer": transformer("EasyAnimate", in_channels=CHANNELS + extra), "vae": magvit()}
    return {**made, "scheduler": flow(), **without("text_encoder", "tokenizer")}


def easyanimate_call(**changes: Any) -> dict[str, Any]:
    texts = embeddings(prompt_embeds=TEXT, prompt_attention_mask=TEXT[:2])
    return call(prompt=None, **{**texts, **changes})


@tiny("EasyAnimatePipeline")
def easyanimate() -> Tiny:
    return easyanimate_parts(), easyanimate_call()


@tiny("EasyAnimateControlPipeline")
def easyanimate_control() -> Tiny:
    return easyanimate_parts(extra=2 * CHANNELS), easyanimate_call(control_video=torch.rand(1, 3, 9, 16, 32))


@tiny("EasyAnimateInpaintPipeline")
def easyanimate_inpaint() -> Tiny:
    clips = {"video": torch.rand(1, 3, 9, 16, 32), "mask_video": torch.full((1, 1, 9, 16, 32), 255.0)}
    return easyanimate_parts(extra=CHANNELS + 1), easyanimate_call(**clips)


_ = SIZE, video
