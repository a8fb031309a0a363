"""Layouts of the transformers that do not descend from Wan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from postgen.families.layout import Grid, Layout, grid_bcthw, grid_btchw, grid_packed


def _grid_bthwc(config: Any, arguments: Mapping[str, Any]) -> Grid:
    _, frames, height, width, _ = arguments["hidden_states"].shape
    patch_t, patch_h, patch_w = config.patch_size
    return Grid(frames=frames // patch_t, height=height // patch_h, width=width // patch_w)


ROWS = (
    Layout(
        transformer="AllegroTransformer3DModel",
        self_attention=r"transformer_blocks\.\d+\.attn1",
        blocks=r"transformer_blocks\.\d+",
        token_order="video",
        latent_axes="BCTHW",
        timestep_shapes=("B",),
        grid_rule=grid_bcthw,
        attention_call="sdpa",
    ),
    Layout(
        transformer="ConsisIDTransformer3DModel",
        self_attention=r"transformer_blocks\.\d+\.attn1",
        blocks=r"transformer_blocks\.\d+",
        token_order="text-video",
        latent_axes="BTCHW",
        timestep_shapes=("B",),
        grid_rule=grid_btchw,
        attention_call="sdpa",
    ),
    Layout(
        transformer="CosmosTransformer3DModel",
        self_attention=r"transformer_blocks\.\d+\.attn1",
        blocks=r"transformer_blocks\.\d+",
        token_order="video",
        latent_axes="BCTHW",
        timestep_shapes=("B", "B1T11"),
        grid_rule=grid_bcthw,
        attention_call="dispatch",
    ),
    Layout(
        transformer="EasyAnimateTransformer3DModel",
        self_attention=r"transformer_blocks\.\d+\.attn1",
        blocks=r"transformer_blocks\.\d+",
        token_order="text-video",
        latent_axes="BCTHW",
        timestep_shapes=("B",),
        grid_rule=grid_bcthw,
        attention_call="sdpa",
    ),
    Layout(
        transformer="HunyuanVideo15Transformer3DModel",
        self_attention=r"transformer_blocks\.\d+\.attn",
        blocks=r"transformer_blocks\.\d+",
        token_order="video-text",
        latent_axes="BCTHW",
        timestep_shapes=("B",),
        grid_rule=grid_bcthw,
        attention_call="dispatch",
    ),
    Layout(
        transformer="HunyuanVideoFramepackTransformer3DModel",
        self_attention=r"(single_)?transformer_blocks\.\d+\.attn",
        blocks=r"(single_)?transformer_blocks\.\d+",
        token_order="history-video-text",
        latent_axes="BCTHW",
        timestep_shapes=("B",),
        grid_rule=grid_bcthw,
        attention_call="dispatch",
    ),
    Layout(
        transformer="Kandinsky5Transformer3DModel",
        self_attention=r"visual_transformer_blocks\.\d+\.self_attention",
        blocks=r"visual_transformer_blocks\.\d+",
        # Block-sparse attention reorders the tokens within a frame only.
        token_order="video",
        latent_axes="BTHWC",
        timestep_shapes=("B",),
        grid_rule=_grid_bthwc,
        attention_call="dispatch",
    ),
    Layout(
        transformer="Kandinsky6Transformer3DModel",
        self_attention=r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention",
        blocks=r"visual_transformer_blocks\.\d+",
        # The given image of image-to-video is one more frame, the last.
        token_order="video",
        latent_axes="BTHWC",
        timestep_shapes=("B",),
        grid_rule=_grid_bthwc,
        attention_call="dispatch",
    ),
    Layout(
        transformer="LTX2VideoTransformer3DModel",
        self_attention=r"transformer_blocks\.\d+\.attn1",
        blocks=r"transformer_blocks\.\d+",
        # Key frames and references are appended.
        token_order="video-reference",
        latent_axes="packed",
        timestep_shapes=("B", "BL"),
        grid_rule=grid_packed,
        attention_call="dispatch",
    ),
    Layout(
        transformer="LatteTransformer3DModel",
        self_attention=r"temporal_transformer_blocks\.\d+\.attn1",
        blocks=r"(temporal_)?transformer_blocks\.\d+",
        token_order="video",
        latent_axes="BCTHW",
        timestep_shapes=("B",),
        grid_rule=grid_bcthw,
        attention_call="sdpa",
        factorised=True,
    ),
    Layout(
        transformer="MochiTransformer3DModel",
        self_attention=r"transformer_blocks\.\d+\.attn1",
        blocks=r"transformer_blocks\.\d+",
        token_order="video-text",
        latent_axes="BCTHW",
        timestep_shapes=("B",),
        grid_rule=grid_bcthw,
        attention_call="sdpa",
        scale_target="norm2",
    ),
    Layout(
        transformer="MotifVideoTransformer3DModel",
        self_attention=r"(single_)?transformer_blocks\.\d+\.attn",
        blocks=r"(single_)?transformer_blocks\.\d+",
        # In the blocks of its decoder, the video of the encoder stands where the text is elsewhere.
        token_order="video-text",
        latent_axes="BCTHW",
        timestep_shapes=("B",),
        grid_rule=grid_bcthw,
        attention_call="dispatch",
    ),
)
