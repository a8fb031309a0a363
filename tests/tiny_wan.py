"""A tiny Wan pipeline with random weights, built from its configs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXT_DIM = 16
LATENT_CHANNELS = 4


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a fast tokenizer with one token per byte, so that it can encode every text, and `</s>` at the end."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    symbols = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def wan_components(*, in_channels: int = LATENT_CHANNELS, head_dim: int = 12, seed: int = 0) -> dict[str, Any]:
    """Return the components of a Wan pipeline with random weights and Wan's compression: 8x in space, 4x in time.

    `latents_mean` and `latents_std` are neither 0 nor 1, so that tests detect a missing normalisation. `in_channels`
    is larger than the 4 latent channels for an image-to-video transformer. FP8 layers accept the width with `head_dim`
    16.
    """
    import torch
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    vae = AutoencoderKLWan(
        base_dim=8,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        z_dim=LATENT_CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[0.5, 1.5, 2.0, 0.8],
    )
    transformer = WanTransformer3DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=head_dim,
        in_channels=in_channels,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
    )
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_DIM,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            dropout_rate=0.0,
        )
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder.eval(),
        "vae": vae.eval(),
        "transformer": transformer.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
