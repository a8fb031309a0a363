"""Layouts of the video transformers that are not derived from Wan."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from postgen.families.blocks import BlockGroup, Blocks
from postgen.families.layout import Call, Layout, video_row
from postgen.families.video_tokens import Grid, VideoTokens, grid_bcthw, grid_btchw, grid_packed


def _grid_bthwc(config: Any, arguments: Mapping[str, Any]) -> Grid:
    _, frames, height, width, _ = arguments["hidden_states"].shape
    patch_t, patch_h, patch_w = config.patch_size
    return Grid(frames=frames // patch_t, height=height // patch_h, width=width // patch_w)


_FLAT = Blocks(groups=(BlockGroup(names=r"transformer_blocks\.\d+"),))
"""Blocks with cross-attention to the text; they do not change the text."""

_JOINT = Blocks(groups=(BlockGroup(names=r"transformer_blocks\.\d+", hidden_out=0, text_out=1),))
"""Blocks with joint attention over text and video, which change both."""


def _double_single(breaks: str = "") -> Blocks:
    """Return joint blocks with separate weights for text and video, then joint blocks with shared weights."""
    double, single = r"transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"
    return Blocks(
        groups=(
            BlockGroup(names=double, hidden_out=0, text_out=1),
            BlockGroup(names=single, hidden_out=0, text_out=1, breaks=breaks),
        )
    )


_row = functools.partial(
    video_row,
    VideoTokens(
        self_attention=r"transformer_blocks\.\d+\.attn1",
        token_order="video",
        latent_axes="BCTHW",
        grid_rule=grid_bcthw,
        attention_call="dispatch",
    ),
)


_SINGLE_AND_DOUBLE = r"(single_)?transformer_blocks\.\d+\.attn"


def _one_group(names: str = r"transformer_blocks\.\d+", **fields: Any) -> Blocks:
    return Blocks(groups=(BlockGroup(names=names, **fields),))


def _latte() -> Blocks:
    turned = "the tokens are grouped by frame for one block and by position for the next"
    groups = (
        BlockGroup(names=r"transformer_blocks\.\d+", breaks=turned),
        BlockGroup(names=r"temporal_transformer_blocks\.\d+", enters=turned, breaks=turned),
    )
    return Blocks(groups=groups, interleaved=True)


_AUDIO = "the audio passes through the blocks in addition to the video"
_VISUAL = r"visual_transformer_blocks\.\d+"

ROWS = (
    _row(
        "AllegroTransformer3DModel",
        _FLAT,
        Call(extras="allegro", text_width="caption_channels"),
        attention_call="sdpa",
    ),
    _row(
        "CogVideoXTransformer3DModel",
        _JOINT,
        Call(extras="cogvideox", text_tokens=226, text_width="text_embed_dim"),
        token_order="text-video",
        latent_axes="BTCHW",
        grid_rule=grid_btchw,
        attention_call="sdpa",
        attention="postgen.families.attention.cogvideox:ANATOMY",
        denoisers={"CogVideoXPipeline": "postgen.families.cogvideox:CogVideoXDenoiser"},
    ),
    _row(
        "ConsisIDTransformer3DModel",
        _one_group(hidden_out=0, text_out=1, breaks="the face of a given person is added between the blocks"),
        Call(extras="consisid", text_tokens=226, text_width="text_embed_dim"),
        token_order="text-video",
        latent_axes="BTCHW",
        grid_rule=grid_btchw,
        attention_call="sdpa",
    ),
    _row(
        "CosmosTransformer3DModel",
        _FLAT,
        Call(extras="cosmos", text_width="text_embed_dim"),
        timestep_shapes=("B", "B1T11"),
        attention_call="dispatch",
    ),
    _row(
        "EasyAnimateTransformer3DModel",
        _JOINT,
        Call(extras="easyanimate", text_tokens=256, text_width="text_embed_dim"),
        token_order="text-video",
        attention_call="sdpa",
    ),
    _row(
        "HunyuanVideo15Transformer3DModel",
        _JOINT,
        Call(extras="hunyuan_15", text_tokens=1000, text_width="text_embed_dim", space=16),
        self_attention=r"transformer_blocks\.\d+\.attn",
        token_order="video-text",
        attention_call="dispatch",
        attention="postgen.families.attention.hunyuan_video:ANATOMY",
    ),
    _row(
        "HunyuanVideoFramepackTransformer3DModel",
        _double_single(),
        Call(extras="framepack", text_tokens=256, text_width="text_embed_dim"),
        self_attention=_SINGLE_AND_DOUBLE,
        token_order="history-video-text",
        attention_call="dispatch",
    ),
    _row(
        "HunyuanVideoTransformer3DModel",
        _double_single(),
        Call(extras="hunyuan", text_tokens=256, text_width="text_embed_dim"),
        self_attention=_SINGLE_AND_DOUBLE,
        token_order="video-text",
        attention_call="dispatch",
        attention="postgen.families.attention.hunyuan_video:ANATOMY",
        denoisers={"HunyuanVideoPipeline": "postgen.families.hunyuan_video:HunyuanVideoDenoiser"},
    ),
    _row(
        "Kandinsky5Transformer3DModel",
        _one_group(_VISUAL, hidden="visual_embed", text="text_embed"),
        Call(extras="kandinsky5", text_width="in_text_dim"),
        self_attention=_VISUAL + r"\.self_attention",
        # Block-sparse attention reorders tokens only within a frame.
        token_order="video",
        latent_axes="BTHWC",
        grid_rule=_grid_bthwc,
        attention_call="dispatch",
    ),
    _row(
        "Kandinsky6Transformer3DModel",
        _one_group(_VISUAL, hidden="vis", text="text_v", hidden_out=0, breaks=_AUDIO),
        Call(extras="kandinsky6", text_tokens=1024, text_width="in_text_dim"),
        self_attention=_VISUAL + r"\.video_dec_block\.self_attention",
        # In image-to-video, the given image is an additional last frame.
        token_order="video",
        latent_axes="BTHWC",
        grid_rule=_grid_bthwc,
        attention_call="dispatch",
    ),
    _row(
        "LTX2VideoTransformer3DModel",
        _one_group(hidden_out=0, breaks=_AUDIO),
        Call(extras="ltx2", text_tokens=1024, text_width="caption_channels", time=8, space=32),
        # Tokens of key frames and references follow those of the video.
        token_order="video-reference",
        latent_axes="packed",
        timestep_shapes=("B", "BL"),
        grid_rule=grid_packed,
        attention_call="dispatch",
    ),
    _row(
        "LTXVideoTransformer3DModel",
        _FLAT,
        Call(extras="ltx", text_tokens=128, text_width="caption_channels", time=8, space=32),
        latent_axes="packed",
        timestep_shapes=("B", "BL"),
        grid_rule=grid_packed,
        attention_call="dispatch",
        attention="postgen.families.attention.ltx:ANATOMY",
        denoisers={"LTXPipeline": "postgen.families.ltx:LTXDenoiser"},
    ),
    _row(
        "LatteTransformer3DModel",
        _latte(),
        Call(text_tokens=120, text_width="caption_channels", time=1),
        self_attention=r"temporal_transformer_blocks\.\d+\.attn1",
        attention_call="sdpa",
        factorised=True,
    ),
    _row(
        "MochiTransformer3DModel",
        _JOINT,
        Call(extras="mochi", text_tokens=256, text_width="text_embed_dim", time=6),
        token_order="video-text",
        attention_call="sdpa",
        scale_target="norm2",
    ),
    _row(
        "MotifVideoTransformer3DModel",
        _double_single("the decoder's blocks start from the video again, and take the encoder's video as their text"),
        Call(extras="motif", text_width="text_embed_dim"),
        self_attention=_SINGLE_AND_DOUBLE,
        # In the decoder's blocks, the tokens of the encoder's video are in the place of the text.
        token_order="video-text",
        attention_call="dispatch",
    ),
    # `rows_refused` has the reason why this class has no video tokens.
    Layout(transformer="SanaVideoTransformer3DModel", blocks=_FLAT, timestep_shapes=("B", "BL")),
)
