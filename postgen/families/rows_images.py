"""Layouts of transformers that generate images: the blocks of all, and the picture's tokens of some."""

from __future__ import annotations

from typing import Any, Literal

from postgen.families.blocks import BlockGroup, Blocks
from postgen.families.layout import Call, Layout
from postgen.families.video_tokens import GridRule, LatentAxes, TokenOrder, VideoTokens, grid_bchw, grid_of_ids

_TRANSFORMER = r"transformer_blocks\.\d+"
_SINGLE = r"single_transformer_blocks\.\d+"

_FLAT = Blocks(groups=(BlockGroup(names=_TRANSFORMER),))
"""Blocks with cross-attention to the text or modulation by a class; they do not change the text."""

_JOINT = Blocks(groups=(BlockGroup(names=_TRANSFORMER, hidden_out=1, text_out=0),))
"""Blocks with joint attention over text and image, which change both; they return the text first."""

_COGVIEW = Blocks(groups=(BlockGroup(names=_TRANSFORMER, hidden_out=0, text_out=1),))

_JOYIMAGE = Blocks(groups=(BlockGroup(names=r"double_blocks\.\d+", hidden_out=0, text_out=1),))

_JOINED = "text and image are joined into one sequence between the two kinds of blocks"


def _joint_then_one_sequence(names: str = _TRANSFORMER) -> Blocks:
    """Return joint blocks followed by single blocks, which take text and image as one sequence."""
    return Blocks(
        groups=(
            BlockGroup(names=names, hidden_out=1, text_out=0),
            BlockGroup(names=_SINGLE, text=None, enters=_JOINED),
        )
    )


def _refined(hidden: str) -> Blocks:
    """Return a few blocks that refine the noisy image, then blocks that take image and text as one sequence."""
    return Blocks(
        groups=(
            BlockGroup(names=r"noise_refiner\.\d+", hidden=hidden, text=None),
            BlockGroup(names=r"layers\.\d+", hidden=hidden, text=None, enters=_JOINED),
        )
    )


_FLUX = Blocks(
    groups=(
        BlockGroup(names=_TRANSFORMER, hidden_out=1, text_out=0),
        BlockGroup(names=_SINGLE, hidden_out=1, text_out=0),
    )
)
_HUNYUAN_IMAGE = Blocks(
    groups=tuple(BlockGroup(names=names, hidden_out=0, text_out=1) for names in (_TRANSFORMER, _SINGLE))
)
_HUNYUAN_DIT = Blocks(
    groups=(BlockGroup(names=r"blocks\.\d+", breaks="the second half also takes the outputs of the first half"),)
)

_BLOCKS = {
    "AuraFlowTransformer2DModel": _joint_then_one_sequence(r"joint_transformer_blocks\.\d+"),
    "ChromaTransformer2DModel": _joint_then_one_sequence(),
    "CogView3PlusTransformer2DModel": _COGVIEW,
    "CogView4Transformer2DModel": _COGVIEW,
    # Conditioned on a class instead of a text.
    "DiTTransformer2DModel": Blocks(groups=(BlockGroup(names=_TRANSFORMER, text=None),)),
    "Flux2Transformer2DModel": _joint_then_one_sequence(),
    "FluxTransformer2DModel": _FLUX,
    "HunyuanDiT2DModel": _HUNYUAN_DIT,
    "HunyuanImageTransformer2DModel": _HUNYUAN_IMAGE,
    "JoyImageEditPlusTransformer3DModel": _JOYIMAGE,
    "JoyImageEditTransformer3DModel": _JOYIMAGE,
    "LongCatImageTransformer2DModel": _FLUX,
    "Lumina2Transformer2DModel": _refined("hidden_states"),
    "OvisImageTransformer2DModel": _FLUX,
    "PRXTransformer2DModel": Blocks(groups=(BlockGroup(names=r"blocks\.\d+"),)),
    "PixArtTransformer2DModel": _FLAT,
    "QwenImageTransformer2DModel": _JOINT,
    "SD3Transformer2DModel": _JOINT,
    "SanaTransformer2DModel": _FLAT,
    "ZImageTransformer2DModel": _refined("x"),
}

_DENOISERS = {
    "DiTTransformer2DModel": {"DiTPipeline": "postgen.families.dit:DiTDenoiser"},
    "FluxTransformer2DModel": {"FluxPipeline": "postgen.families.flux:FluxDenoiser"},
    "PixArtTransformer2DModel": {"PixArtSigmaPipeline": "postgen.families.pixart:PixArtSigmaDenoiser"},
    "SD3Transformer2DModel": {
        "StableDiffusion3Pipeline": "postgen.families.stable_diffusion_3:StableDiffusion3Denoiser"
    },
}


def _image(
    names: str,
    order: TokenOrder,
    axes: LatentAxes = "BCHW",
    rule: GridRule = grid_bchw,
    attention_call: Literal["dispatch", "sdpa"] = "sdpa",
) -> VideoTokens:
    return VideoTokens(
        self_attention=names, token_order=order, latent_axes=axes, grid_rule=rule, attention_call=attention_call
    )


_ATTENTION = "postgen.families.attention."
_FLUX_IMAGE = _image(rf"({_SINGLE}|{_TRANSFORMER})\.attn", "text-video", "packed", grid_of_ids, "dispatch")
_BASIC_IMAGE = _image(rf"{_TRANSFORMER}\.attn1", "video")

_READ: dict[str, dict[str, Any]] = {
    "ChromaTransformer2DModel": {
        "image": _FLUX_IMAGE,
        "call": Call(extras="chroma", text_width="joint_attention_dim", time=1, space=16),
        "attention": _ATTENTION + "flux:ANATOMY",
    },
    "DiTTransformer2DModel": {
        "image": _BASIC_IMAGE,
        "call": Call(extras="dit", text_tokens=0, text_width=None, time=1),
        "attention": _ATTENTION + "basic:ANATOMY",
    },
    "FluxTransformer2DModel": {
        "image": _FLUX_IMAGE,
        # The pipeline packs 2 x 2 latents into one token.
        "call": Call(extras="flux", text_width="joint_attention_dim", time=1, space=16),
        "attention": _ATTENTION + "flux:ANATOMY",
    },
    "PixArtTransformer2DModel": {
        "image": _BASIC_IMAGE,
        "call": Call(extras="pixart", text_tokens=300, text_width="caption_channels", time=1),
        "attention": _ATTENTION + "basic:ANATOMY",
    },
    "SD3Transformer2DModel": {
        # The second attention (attn2) of SD 3.5's dual blocks is over the picture alone.
        "image": _image(rf"{_TRANSFORMER}\.attn2?", "video-text"),
        # 77 tokens of CLIP, then 256 of T5.
        "call": Call(extras="pooled", text_tokens=77 + 256, text_width="joint_attention_dim", time=1),
        "attention": _ATTENTION + "stable_diffusion_3:ANATOMY",
    },
}
"""Picture tokens, call and attention of the classes whose attention methods may change."""

ROWS = tuple(
    Layout(transformer=name, blocks=blocks, denoisers=_DENOISERS.get(name, {}), **_READ.get(name, {}))
    for name, blocks in _BLOCKS.items()
)
