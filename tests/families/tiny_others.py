"""Tiny video transformers that are not derived from Wan."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.tiny_parts import (
    CHANNELS,
    COLUMNS,
    HEAD_DIM,
    HEADS,
    INNER,
    ROWS,
    TEXT_DIM,
    TEXT_TOKENS,
    Built,
    Size,
    builder,
    wan_arguments,
)


def cogvideox_config(size: Size, **changes: Any) -> dict[str, Any]:
    """Return config entries that CogVideoX and ConsisID share."""
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
    """Return config entries that HunyuanVideo and classes derived from it share."""
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
    """Return forward arguments that HunyuanVideo and classes derived from it share."""
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


@builder("ConsisID")
def consisid(size: Size) -> Built:
    """Build a model with a face as a condition."""
    from diffusers import ConsisIDTransformer3DModel

    face = {"is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2}
    extractor = {"id_dim": 8, "vit_dim": 8, "depth": 5, "dim_head": 8, "num_heads": 2, "num_id_token": 2}
    extractor |= {"num_querie": 4, "output_dim": int(INNER / 3 * 2), "ff_mult": 2}
    config = cogvideox_config(size, **face, **{f"LFE_{key}": value for key, value in extractor.items()})
    arguments = wan_arguments(
        size,
        hidden_states=size.latents().transpose(1, 2),
        id_cond=torch.randn(size.batch, 8),
        id_vit_hidden=[torch.randn(size.batch, 3, 8) for _ in range(5)],
    )
    return ConsisIDTransformer3DModel, config, arguments


@builder("HunyuanVideo Framepack")
def framepack(size: Size) -> Built:
    """Build a model with clean frames and two compressed histories before the current frames."""
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    config = hunyuan_config(size, has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True)
    arguments = hunyuan_arguments(size, image_embeds=torch.randn(size.batch, 3, 8))
    start = 0
    for name, frames in (("history_4x", 4), ("history_2x", 2), ("clean", 2)):
        arguments[f"latents_{name}"] = torch.randn(size.batch, CHANNELS, frames, ROWS * 2, COLUMNS * 2)
        arguments[f"indices_latents_{name}"] = torch.arange(start, start + frames)
        start += frames
    arguments["indices_latents"] = torch.arange(start, start + size.frames)
    return HunyuanVideoFramepackTransformer3DModel, config, arguments


@builder("HunyuanVideo 1.5")
def hunyuan_15(size: Size) -> Built:
    from diffusers import HunyuanVideo15Transformer3DModel

    changes = {"text_embed_2_dim": 12, "image_embed_dim": 8}
    config = hunyuan_config(size, **changes)
    for name in ("num_single_layers", "pooled_projection_dim"):
        del config[name]
    arguments = wan_arguments(
        size,
        hidden_states=size.latents(patch=1),
        encoder_attention_mask=size.text_mask(),
        encoder_hidden_states_2=size.text(12),
        encoder_attention_mask_2=size.text_mask(),
        image_embeds=torch.randn(size.batch, 3, 8),
    )
    return HunyuanVideo15Transformer3DModel, config, arguments


@builder("LTX-2")
def ltx2(size: Size) -> Built:
    from diffusers import LTX2VideoTransformer3DModel

    stream = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "cross_attention_dim": INNER,
    }
    audio = {f"audio_{key}": value for key, value in stream.items()}
    config = {**stream, **audio, "num_layers": size.layers, "caption_channels": TEXT_DIM}
    arguments = {
        "hidden_states": torch.randn(size.batch, size.tokens, CHANNELS),
        "audio_hidden_states": torch.randn(size.batch, 4, CHANNELS),
        "encoder_hidden_states": size.text(),
        "audio_encoder_hidden_states": size.text(),
        "timestep": size.timestep(),
        "encoder_attention_mask": size.text_mask(),
        "audio_encoder_attention_mask": size.text_mask(),
        "num_frames": size.frames,
        "height": ROWS,
        "width": COLUMNS,
        "audio_num_frames": 4,
    }
    return LTX2VideoTransformer3DModel, config, arguments


@builder("Mochi")
def mochi(size: Size) -> Built:
    from diffusers import MochiTransformer3DModel

    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": size.layers,
        "pooled_projection_dim": 16,
        "in_channels": CHANNELS,
        "text_embed_dim": TEXT_DIM,
        "time_embed_dim": 8,
        "max_sequence_length": TEXT_TOKENS,
    }
    return MochiTransformer3DModel, config, wan_arguments(size, encoder_attention_mask=size.text_mask(torch.bool))


@builder("Allegro")
def allegro(size: Size) -> Built:
    from diffusers import AllegroTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    dim = 24  # a third of it, halved, for each axis
    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": dim,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": size.layers,
        "cross_attention_dim": HEADS * dim,
        "sample_width": COLUMNS * 2,
        "sample_height": ROWS * 2,
        "caption_channels": TEXT_DIM,
    }
    corners = ((0, 0), (ROWS, COLUMNS))
    frequencies = get_3d_rotary_pos_embed_allegro(dim, corners, (ROWS, COLUMNS), size.frames)
    grid = torch.cartesian_prod(torch.arange(size.frames), torch.arange(ROWS), torch.arange(COLUMNS))
    places = tuple(grid.T[:, None].long())
    arguments = wan_arguments(
        size, encoder_attention_mask=size.text_mask(), image_rotary_emb=(frequencies[:3], places)
    )
    return AllegroTransformer3DModel, config, arguments


@builder("Latte")
def latte(size: Size) -> Built:
    from diffusers import LatteTransformer3DModel

    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": size.layers,
        "cross_attention_dim": INNER,
        "attention_bias": True,
        "sample_size": ROWS * 2,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "caption_channels": TEXT_DIM,
        "video_length": size.frames,
    }
    return LatteTransformer3DModel, config, wan_arguments(size)


@builder("EasyAnimate")
def easyanimate(size: Size) -> Built:
    from diffusers import EasyAnimateTransformer3DModel

    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "patch_size": 2,
        "sample_width": COLUMNS * 2,
        "sample_height": ROWS * 2,
        "num_layers": size.layers,
        "mmdit_layers": size.layers - 1,
        "time_embed_dim": 8,
        "text_embed_dim": TEXT_DIM,
        "text_embed_dim_t5": 12,
    }
    return EasyAnimateTransformer3DModel, config, wan_arguments(size, encoder_hidden_states_t5=size.text(12))


@builder("Cosmos")
def cosmos(size: Size) -> Built:
    from diffusers import CosmosTransformer3DModel

    config = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "num_layers": size.layers,
        "mlp_ratio": 2,
        "text_embed_dim": TEXT_DIM,
        "adaln_lora_dim": 4,
        "max_size": (8, 16, 16),
        "concat_padding_mask": False,  # resizing the mask needs torchvision
    }
    return CosmosTransformer3DModel, config, wan_arguments(size, fps=16)


@builder("Kandinsky 5")
def kandinsky5(size: Size) -> Built:
    from diffusers import Kandinsky5Transformer3DModel

    config = {
        "in_visual_dim": CHANNELS,
        "out_visual_dim": CHANNELS,
        "in_text_dim": TEXT_DIM,
        "in_text_dim2": 8,
        "time_dim": 16,
        "model_dim": INNER,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": size.layers,
        "axes_dims": (4, 6, 6),
    }
    arguments = wan_arguments(
        size,
        hidden_states=size.latents().permute(0, 2, 3, 4, 1),
        pooled_projections=torch.randn(size.batch, 8),
        visual_rope_pos=[torch.arange(length) for length in (size.frames, ROWS, COLUMNS)],
        text_rope_pos=torch.arange(TEXT_TOKENS),
    )
    return Kandinsky5Transformer3DModel, config, arguments


@builder("Kandinsky 6")
def kandinsky6(size: Size) -> Built:
    from diffusers import Kandinsky6Transformer3DModel

    config = {
        "in_visual_dim": CHANNELS,
        "out_visual_dim": CHANNELS,
        "in_text_dim": TEXT_DIM,
        "in_text_dim2": 8,
        "time_dim": 16,
        "model_dim": INNER,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": size.layers,
        "axes_dims": (4, 6, 6),
        "in_audio_dim": 4,
        "out_audio_dim": 4,
    }
    arguments = wan_arguments(
        size,
        hidden_states=size.latents(2 * CHANNELS + 1).permute(0, 2, 3, 4, 1),
        pooled_projections=torch.randn(size.batch, 8),
        audio_hidden_states=torch.randn(size.batch, 4, 4),
    )
    return Kandinsky6Transformer3DModel, config, arguments


@builder("Motif")
def motif(size: Size) -> Built:
    """Build a model that also has a decoder block, which attends to the encoder's video."""
    from diffusers import MotifVideoTransformer3DModel

    config = hunyuan_config(
        size, num_single_layers=size.layers + 1, num_decoder_layers=1, norm_type="layer_norm", image_embed_dim=8
    )
    for name in ("num_refiner_layers", "pooled_projection_dim"):
        del config[name]
    arguments = wan_arguments(
        size, encoder_attention_mask=size.text_mask(), image_embeds=torch.randn(size.batch, 3, 8)
    )
    return MotifVideoTransformer3DModel, config, arguments
