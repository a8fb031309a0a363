"""Layouts of the transformers that descend from Wan: flat tokens, frame by frame, text by cross-attention only."""

from __future__ import annotations

from typing import Any

from postgen.families.layout import Layout, TimestepShape, TokenOrder, grid_bcthw, grid_btchw


def _frames_per_block(config: Any) -> int:
    """1 is written for attention that is not causal."""
    frames: int = config.num_frame_per_block
    return frames if frames > 1 else 0


def _wan_like(
    transformer: str,
    *,
    blocks: str = r"blocks\.\d+",
    token_order: TokenOrder = "video",
    timestep_shapes: tuple[TimestepShape, ...] = ("B",),
    **changes: Any,
) -> Layout:
    row: dict[str, Any] = {"latent_axes": "BCTHW", "grid_rule": grid_bcthw, **changes}
    return Layout(
        transformer=transformer,
        self_attention=r"blocks\.\d+\.attn1",
        blocks=blocks,
        token_order=token_order,
        timestep_shapes=timestep_shapes,
        attention_call="dispatch",
        **row,
    )


ROWS = (
    _wan_like("AnyFlowTransformer3DModel", timestep_shapes=("BT",), latent_axes="BTCHW", grid_rule=grid_btchw),
    # Editing an image makes two latent frames; the reasoning steps make more.
    _wan_like("ChronoEditTransformer3DModel"),
    # Long, middle and short history come first; their keys may be amplified, those of the current frames are not.
    _wan_like("HeliosTransformer3DModel", token_order="history-video"),
    _wan_like("SkyReelsV2Transformer3DModel", timestep_shapes=("B", "BT"), causal_rule=_frames_per_block),
    # The reference image is the first frame. The face adapters attend within a frame.
    _wan_like("WanAnimateTransformer3DModel"),
    # Reference images are leading frames. The control blocks steer the main ones and are left alone.
    _wan_like("WanVACETransformer3DModel", blocks=r"(vace_)?blocks\.\d+"),
)
