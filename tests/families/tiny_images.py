"""Tiny transformers that generate images, and tiny video transformers without softmax attention over frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
)

POOLED = 8


def picture(size: Size, channels: int = CHANNELS, side: int | None = None) -> Tensor:
    """Return latents (B, C, H, W) of a picture with 2 x 3 patches of 2 x 2, or of a square with this side."""
    return torch.randn(size.batch, channels, side or ROWS * 2, side or COLUMNS * 2)


def heads(size: Size, **changes: Any) -> dict[str, Any]:
    """Return config entries that many classes share."""
    config = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "num_layers": size.layers}
    return {**config, "in_channels": CHANNELS, **changes}


def arguments(size: Size, **changes: Any) -> dict[str, Any]:
    """Return forward arguments that many classes share."""
    shared = {"hidden_states": picture(size), "encoder_hidden_states": size.text(), "timestep": size.timestep()}
    return {**shared, **changes}


def ids(width: int) -> dict[str, Tensor]:
    """Return the positions of 2 x 3 image tokens and of the text tokens."""
    image = torch.zeros(ROWS * COLUMNS, width)
    image[:, 1:3] = torch.cartesian_prod(torch.arange(ROWS), torch.arange(COLUMNS)).float()
    return {"img_ids": image, "txt_ids": torch.zeros(TEXT_TOKENS, width)}


def packed(size: Size) -> dict[str, Any]:
    return arguments(size, hidden_states=torch.randn(size.batch, ROWS * COLUMNS, CHANNELS))


@builder("Flux", video=False)
def flux(size: Size) -> Built:
    from diffusers import FluxTransformer2DModel

    config = heads(
        size, num_single_layers=size.layers, joint_attention_dim=TEXT_DIM, pooled_projection_dim=POOLED,
        axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    given = {**packed(size), **ids(3), "pooled_projections": torch.randn(size.batch, POOLED)}
    return FluxTransformer2DModel, config, {**given, "guidance": torch.full((size.batch,), 3.5)}


@builder("Flux 2", video=False)
def flux2(size: Size) -> Built:
    from diffusers import Flux2Transformer2DModel

    config = heads(
        size, num_single_layers=size.layers, joint_attention_dim=TEXT_DIM, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return Flux2Transformer2DModel, config, {**packed(size), **ids(4), "guidance": torch.full((size.batch,), 3.5)}


@builder("Chroma", video=False)
def chroma(size: Size) -> Built:
    from diffusers import ChromaTransformer2DModel

    config = heads(
        size, num_single_layers=size.layers, joint_attention_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return ChromaTransformer2DModel, config, {**packed(size), **ids(3)}


def like_flux(size: Size, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config and arguments of classes like Flux, without an embedded guidance scale."""
    config = heads(size, num_single_layers=size.layers, joint_attention_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6))
    return {**config, **changes}, {**packed(size), **ids(3)}


@builder("LongCat-Image", video=False)
def longcat(size: Size) -> Built:
    from diffusers import LongCatImageTransformer2DModel

    return LongCatImageTransformer2DModel, *like_flux(size, pooled_projection_dim=POOLED)


@builder("Ovis-Image", video=False)
def ovis(size: Size) -> Built:
    from diffusers import OvisImageTransformer2DModel

    return OvisImageTransformer2DModel, *like_flux(size, out_channels=CHANNELS)


@builder("HunyuanImage", video=False)
def hunyuan_image(size: Size) -> Built:
    from diffusers import HunyuanImageTransformer2DModel

    config = heads(
        size, out_channels=CHANNELS, num_single_layers=size.layers, num_refiner_layers=1, mlp_ratio=2.0,
        patch_size=(1, 1), text_embed_dim=TEXT_DIM, rope_axes_dim=(8, 8),
    )  # fmt: skip
    return HunyuanImageTransformer2DModel, config, arguments(size, encoder_attention_mask=size.text_mask())


@builder("PRX", video=False)
def prx(size: Size) -> Built:
    from diffusers import PRXTransformer2DModel

    config = {
        "in_channels": CHANNELS, "patch_size": 2, "context_in_dim": TEXT_DIM, "hidden_size": INNER, "mlp_ratio": 2.0,
        "num_heads": HEADS, "depth": size.layers, "axes_dim": [8, 8],
    }  # fmt: skip
    return PRXTransformer2DModel, config, arguments(size, attention_mask=size.text_mask(torch.bool))


@builder("Stable Diffusion 3", video=False)
def stable_diffusion_3(size: Size) -> Built:
    """Build a model with two self-attentions in the first block, like SD 3.5 medium."""
    from diffusers import SD3Transformer2DModel

    config = heads(
        size, sample_size=8, joint_attention_dim=TEXT_DIM, caption_projection_dim=INNER, out_channels=CHANNELS,
        pooled_projection_dim=POOLED, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    pooled = torch.randn(size.batch, POOLED)
    return SD3Transformer2DModel, config, arguments(size, pooled_projections=pooled)


@builder("DiT", video=False)
def dit(size: Size) -> Built:
    """Build a model that is conditioned on a class instead of a text."""
    from diffusers import DiTTransformer2DModel

    given = {"hidden_states": picture(size, side=8), "timestep": size.timestep().long()}
    return DiTTransformer2DModel, heads(size, sample_size=8), {**given, "class_labels": torch.arange(size.batch) + 7}


@builder("PixArt", video=False)
def pixart(size: Size) -> Built:
    from diffusers import PixArtTransformer2DModel

    config = heads(
        size, sample_size=8, cross_attention_dim=INNER, caption_channels=TEXT_DIM, use_additional_conditions=False
    )
    mask = size.text_mask()
    return (
        PixArtTransformer2DModel,
        config,
        arguments(size, encoder_attention_mask=mask, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    )


def sana_config(size: Size, **changes: Any) -> dict[str, Any]:
    """Return config entries that Sana and its video model share."""
    config = heads(
        size, out_channels=CHANNELS, num_cross_attention_heads=HEADS, cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=INNER, caption_channels=TEXT_DIM, sample_size=8,
    )  # fmt: skip
    return {**config, **changes}


@builder("Sana", video=False)
def sana(size: Size) -> Built:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel, sana_config(size), arguments(size, encoder_attention_mask=size.text_mask())


@builder("AuraFlow", video=False)
def auraflow(size: Size) -> Built:
    from diffusers import AuraFlowTransformer2DModel

    config = {
        "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "in_channels": CHANNELS,
        "num_mmdit_layers": size.layers, "num_single_dit_layers": size.layers, "joint_attention_dim": TEXT_DIM,
        "caption_projection_dim": INNER, "out_channels": CHANNELS, "sample_size": 8, "pos_embed_max_size": 64,
    }  # fmt: skip
    return AuraFlowTransformer2DModel, config, arguments(size)


@builder("Lumina 2", video=False)
def lumina2(size: Size) -> Built:
    from diffusers import Lumina2Transformer2DModel

    config = {
        "sample_size": 8, "in_channels": CHANNELS, "hidden_size": INNER, "num_layers": size.layers,
        "num_refiner_layers": 2, "num_attention_heads": HEADS, "num_kv_heads": 1, "multiple_of": 8,
        "axes_dim_rope": (4, 6, 6), "axes_lens": (16, 16, 16), "cap_feat_dim": TEXT_DIM,
    }  # fmt: skip
    return Lumina2Transformer2DModel, config, arguments(size, encoder_attention_mask=size.text_mask(torch.bool))


@builder("Qwen-Image", video=False)
def qwen_image(size: Size) -> Built:
    from diffusers import QwenImageTransformer2DModel

    config = heads(size, out_channels=CHANNELS, joint_attention_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6))
    more = {
        "encoder_hidden_states_mask": size.text_mask(torch.bool),
        "img_shapes": [[(1, ROWS, COLUMNS)]] * size.batch,
    }
    return QwenImageTransformer2DModel, config, {**packed(size), **more}


@builder("HunyuanDiT", video=False)
def hunyuan_dit(size: Size) -> Built:
    """Build a model with twice as many layers, because only blocks of the second half take outputs of the first."""
    from diffusers import HunyuanDiT2DModel

    config = {
        "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "in_channels": CHANNELS, "patch_size": 2,
        "sample_size": 8, "hidden_size": INNER, "num_layers": 2 * size.layers, "cross_attention_dim": TEXT_DIM,
        "cross_attention_dim_t5": TEXT_DIM, "pooled_projection_dim": POOLED, "text_len": TEXT_TOKENS, "text_len_t5": 4,
        "use_style_cond_and_image_meta_size": False,
    }  # fmt: skip
    return (
        HunyuanDiT2DModel,
        config,
        arguments(
            size,
            hidden_states=picture(size, side=8),
            text_embedding_mask=size.text_mask(),
            encoder_hidden_states_t5=size.text(tokens=4),
            text_embedding_mask_t5=size.text_mask()[:, :4],
            image_rotary_emb=(torch.rand(16, HEAD_DIM), torch.rand(16, HEAD_DIM)),
        ),
    )


@builder("CogView 4", video=False)
def cogview4(size: Size) -> Built:
    from diffusers import CogView4Transformer2DModel

    config = heads(
        size, out_channels=CHANNELS, text_embed_dim=TEXT_DIM, time_embed_dim=8, condition_dim=8, sample_size=8,
        pos_embed_max_size=8, rope_axes_dim=(8, 8),
    )  # fmt: skip
    return CogView4Transformer2DModel, config, arguments(size, **sizes_of(size))


@builder("CogView 3 Plus", video=False)
def cogview3(size: Size) -> Built:
    from diffusers import CogView3PlusTransformer2DModel

    config = heads(
        size, out_channels=CHANNELS, text_embed_dim=TEXT_DIM, time_embed_dim=8, condition_dim=8, sample_size=8,
        pos_embed_max_size=8,
    )  # fmt: skip
    return CogView3PlusTransformer2DModel, config, arguments(size, **sizes_of(size))


def sizes_of(size: Size) -> dict[str, Tensor]:
    side = torch.tensor([[32.0, 48.0]]).repeat(size.batch, 1)
    return {"original_size": side, "target_size": side, "crop_coords": torch.zeros_like(side)}


@builder("Z-Image", video=False)
def z_image(size: Size) -> Built:
    from diffusers import ZImageTransformer2DModel

    config = {
        "in_channels": CHANNELS, "dim": INNER, "n_layers": size.layers, "n_refiner_layers": 2, "n_heads": HEADS,
        "n_kv_heads": HEADS, "cap_feat_dim": TEXT_DIM, "axes_dims": [4, 6, 6], "axes_lens": [64, 16, 16],
    }  # fmt: skip
    given = {
        "x": [torch.randn(CHANNELS, 1, ROWS * 2, COLUMNS * 2) for _ in range(size.batch)],
        "t": torch.full((size.batch,), 0.5),
        "cap_feats": [torch.randn(TEXT_TOKENS, TEXT_DIM) for _ in range(size.batch)],
    }
    return ZImageTransformer2DModel, config, given


@builder("SANA-Video", video=False)
def sana_video(size: Size) -> Built:
    from diffusers import SanaVideoTransformer3DModel

    config = sana_config(size, rope_max_seq_len=32)
    return (
        SanaVideoTransformer3DModel,
        config,
        arguments(size, hidden_states=size.latents(), encoder_attention_mask=size.text_mask()),
    )


@builder("JoyImage edit", video=False)
def joyimage(size: Size) -> Built:
    """Build a model whose input has two frames: the given image and the generated image."""
    from diffusers import JoyImageEditTransformer3DModel

    config = {
        "in_channels": CHANNELS, "hidden_size": INNER, "num_attention_heads": HEADS, "text_dim": TEXT_DIM,
        "num_layers": size.layers, "rope_dim_list": [4, 6, 6],
    }  # fmt: skip
    return JoyImageEditTransformer3DModel, config, arguments(size, hidden_states=size.latents()[:, :, :2])


@builder("JoyImage edit plus", video=False)
def joyimage_plus(size: Size) -> Built:
    """Build a model whose input is patches of three images, two of them given; one is smaller in the last sample."""
    from diffusers import JoyImageEditPlusTransformer3DModel

    _, config, given = joyimage(size)
    shapes = [[(1, ROWS, COLUMNS)] * 3] * (size.batch - 1) + [[(1, ROWS, COLUMNS)] * 2 + [(1, 1, COLUMNS)]]
    patches = torch.randn(size.batch, 3 * ROWS * COLUMNS, CHANNELS, 1, 2, 2)
    changes = {"hidden_states": patches, "encoder_hidden_states_mask": size.text_mask(), "shape_list": shapes}
    return JoyImageEditPlusTransformer3DModel, config, {**given, **changes}
