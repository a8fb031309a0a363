"""Tiny pipelines of all families with a denoiser: real classes with random weights, without downloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.families.tiny_parts import HEAD_DIM, HEADS, INNER
from tests.tiny_wan import TEXT_DIM, byte_tokenizer, wan_components

POOLED = 8


def _tokenizer(length: int = 77) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = length
    return tokenizer


def _clip(width: int = POOLED, *, projection: bool = False, layers: int = 3) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = byte_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=2, projection_dim=width, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _t5(width: int = TEXT_DIM) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(byte_tokenizer()), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


def _flow(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def _picture_vae(**config: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **config,
    ).eval()  # fmt: skip


def cogvideox() -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=TEXT_DIM, num_layers=1, sample_width=4, sample_height=4, sample_frames=9,
        max_text_seq_length=32, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=1.0
    )
    return CogVideoXPipeline(_tokenizer(226), _t5(), vae.eval(), transformer.eval(), scheduler)


def hunyuan_video(**config: Any) -> Any:
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
    from transformers import LlamaConfig, LlamaModel

    tokenizer = _tokenizer(512)
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=TEXT_DIM, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=True,
    )  # fmt: skip
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED, rope_axes_dim=(4, 6, 6), patch_size=1, patch_size_t=1, **config,
    )  # fmt: skip
    return HunyuanVideoPipeline(
        llama.eval(), tokenizer, transformer.eval(), vae.eval(), _flow(shift=7.0), _clip(), _tokenizer()
    )


def ltx() -> Any:
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1), patch_size=1,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
    )  # fmt: skip
    vae.latents_mean, vae.latents_std = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.5, 1.5, 2.0, 0.8])
    transformer = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM,
        cross_attention_dim=INNER, num_layers=1, caption_channels=TEXT_DIM,
    )  # fmt: skip
    scheduler = _flow(use_dynamic_shifting=True, shift_terminal=0.1, base_shift=0.95, max_shift=2.05)
    return LTXPipeline(scheduler, vae.eval(), _t5(), _tokenizer(128), transformer.eval())


def skyreels() -> Any:
    from diffusers import (
        AutoencoderKLWan,
        SkyReelsV2Pipeline,
        SkyReelsV2Transformer3DModel,
        UniPCMultistepScheduler,
    )

    parts = wan_components()
    vae = AutoencoderKLWan(
        base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True], z_dim=4,
        latents_mean=[0.1, -0.2, 0.3, -0.4], latents_std=[0.5, 1.5, 2.0, 0.8],
    )  # fmt: skip
    transformer = SkyReelsV2Transformer3DModel(
        num_layers=1, num_attention_heads=HEADS, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=TEXT_DIM, freq_dim=16, ffn_dim=32,
    )  # fmt: skip
    # A solver of order 1 is the Euler method, with which the test compares.
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1,
        disable_corrector=list(range(20)),
    )  # fmt: skip
    return SkyReelsV2Pipeline(parts["tokenizer"], parts["text_encoder"], transformer.eval(), vae.eval(), scheduler)


def flux() -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM, pooled_projection_dim=POOLED, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    vae = _picture_vae(shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = _flow(use_dynamic_shifting=True, shift=3.0)
    return FluxPipeline(scheduler, vae, _clip(), _tokenizer(), _t5(), _tokenizer(512), transformer.eval())


def stable_diffusion_3() -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS, joint_attention_dim=16, caption_projection_dim=INNER, pooled_projection_dim=16,
        out_channels=4,
    )  # fmt: skip
    vae = _picture_vae(shift_factor=0.1, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False)
    return StableDiffusion3Pipeline(
        transformer.eval(), _flow(shift=3.0), vae, _clip(projection=True), _tokenizer(), _clip(projection=True),
        _tokenizer(), _t5(16), _tokenizer(256),
    )  # fmt: skip


def _unet(**config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, **config,
    ).eval()  # fmt: skip


def _ddim(**config: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1, **config
    )


def stable_diffusion() -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        _picture_vae(), _clip(), _tokenizer(), _unet(cross_attention_dim=POOLED), _ddim(set_alpha_to_one=False), None,
        None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl() -> Any:
    from diffusers import StableDiffusionXLPipeline

    unet = _unet(
        cross_attention_dim=2 * POOLED, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + POOLED, transformer_layers_per_block=1,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        _picture_vae(), _clip(), _clip(projection=True), _tokenizer(), _tokenizer(), unet,
        _ddim(prediction_type="v_prediction"), force_zeros_for_empty_prompt=False,
    )  # fmt: skip


LABELS = ("a red ball", "a blue cube falls", "blurry", "dark", "a", "b", "c", "a ball", "a cube")
"""Names of the tiny DiT's classes from number 7 on: the prompts that tests use for every family."""


def dit() -> Any:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8,
    )  # fmt: skip
    return DiTPipeline(transformer.eval(), _picture_vae(), _ddim(), dict(enumerate(LABELS, 7)))


def pixart_sigma() -> Any:
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=8, num_layers=1,
        sample_size=32, cross_attention_dim=INNER, caption_channels=TEXT_DIM, use_additional_conditions=False,
    )  # fmt: skip
    return PixArtSigmaPipeline(_tokenizer(300), _t5(), _picture_vae(), transformer.eval(), _ddim())


PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "CogVideoX": (cogvideox, {"num_frames": 9, "height": 16, "width": 32}),
    "HunyuanVideo": (hunyuan_video, {"num_frames": 5, "height": 16, "width": 32}),
    "LTX": (ltx, {"num_frames": 9, "height": 32, "width": 64}),
    "SkyReels-V2": (skyreels, {"num_frames": 5, "height": 16, "width": 32}),
    "FLUX": (flux, {"num_frames": 1, "height": 16, "width": 32}),
    "Stable Diffusion 3": (stable_diffusion_3, {"num_frames": 1, "height": 16, "width": 32}),
    "DiT": (dit, {"num_frames": 1, "height": 16, "width": 16}),
    "PixArt-Sigma": (pixart_sigma, {"num_frames": 1, "height": 16, "width": 32}),
    "Stable Diffusion": (stable_diffusion, {"num_frames": 1, "height": 16, "width": 32}),
    "Stable Diffusion XL": (stable_diffusion_xl, {"num_frames": 1, "height": 16, "width": 32}),
}
"""Functions that make the pipelines, each with a size that the pipeline can generate, by name."""

NO_LORA = ("DiT", "PixArt-Sigma")
"""Pipelines whose networks support no LoRA in diffusers."""


def tiny_pipeline(name: str) -> tuple[Any, dict[str, int]]:
    """Return one of `PIPELINES` and its size. Zero weights are replaced by random ones, see `drawn`."""
    torch.manual_seed(0)
    make, size = PIPELINES[name]
    return drawn(make()), size


def drawn(pipe: Any) -> Any:
    """Replace weights that are initialised to zero by random ones, which have an effect, and hide the progress bar."""
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for part in pipe.components.values():
            for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
                if not parameter.any():
                    parameter.normal_(std=0.1)
    return pipe
