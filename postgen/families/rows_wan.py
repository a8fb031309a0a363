"""Layouts of Wan and the transformers that descend from it: flat tokens, frame by frame, text by cross-attention."""

from __future__ import annotations

from typing import Any

from postgen.families.blocks import BlockGroup, Blocks
from postgen.families.layout import Call, Layout, video_row
from postgen.families.video_tokens import VideoTokens, grid_bcthw, grid_btchw

_MAIN = BlockGroup(names=r"blocks\.\d+")
_PLAIN = Blocks(groups=(_MAIN,))


def _frames_per_block(config: Any) -> int:
    """1 is written for attention that is not causal."""
    frames: int = config.num_frame_per_block
    return frames if frames > 1 else 0


_USUAL = VideoTokens(
    self_attention=r"blocks\.\d+\.attn1",
    token_order="video",
    latent_axes="BCTHW",
    grid_rule=grid_bcthw,
    attention_call="dispatch",
)


def _wan_like(transformer: str, call: Call, *, blocks: Blocks = _PLAIN, **changes: Any) -> Layout:
    return video_row(_USUAL, transformer, blocks, call, **changes)


_CONTROLLED = Blocks(
    groups=(
        # They hand on the state of the control and return a hint for a main block beside it.
        BlockGroup(names=r"vace_blocks\.\d+", hidden="control_hidden_states", hidden_out=1),
        BlockGroup(
            names=r"blocks\.\d+",
            enters="the main blocks begin with the video, not with what the control blocks return",
            breaks="hints of the control blocks are added between the main blocks",
        ),
    )
)
_ANIMATED = Blocks(
    groups=(BlockGroup(names=r"blocks\.\d+", breaks="face adapters add the face's motion between the blocks"),)
)

_ATTENTION = "postgen.families.attention.wan:ANATOMY"

ROWS = (
    _wan_like(
        "AnyFlowTransformer3DModel",
        Call(extras="anyflow"),
        timestep_shapes=("BT",),
        latent_axes="BTCHW",
        grid_rule=grid_btchw,
    ),
    # Editing an image makes two latent frames; the reasoning steps make more.
    _wan_like(
        "ChronoEditTransformer3DModel",
        Call(extras="image_of_wan"),
        timestep_shapes=("B", "BL"),
        attention=_ATTENTION,
    ),
    # Long, middle and short history come first; their keys may be amplified, those of the current frames are not.
    _wan_like("HeliosTransformer3DModel", Call(extras="helios"), token_order="history-video"),
    _wan_like(
        "SkyReelsV2Transformer3DModel",
        Call(extras="skyreels"),
        timestep_shapes=("B", "BT"),
        causal_rule=_frames_per_block,
        attention=_ATTENTION,
        denoisers={"SkyReelsV2Pipeline": "postgen.families.wan:SkyReelsV2Denoiser"},
    ),
    # The reference image is the first frame. The face adapters attend within a frame.
    _wan_like(
        "WanAnimateTransformer3DModel",
        Call(extras="animate", more_frames=1),
        blocks=_ANIMATED,
        attention=_ATTENTION,
    ),
    _wan_like(
        "WanTransformer3DModel",
        Call(extras="image_of_wan"),
        timestep_shapes=("B", "BL"),
        attention=_ATTENTION,
        denoisers={
            "WanImageToVideoPipeline": "postgen.families.wan:WanDenoiser",
            "WanPipeline": "postgen.families.wan:WanDenoiser",
        },
    ),
    # Reference images are leading frames. The control blocks steer the main ones; their attention is left alone.
    _wan_like("WanVACETransformer3DModel", Call(extras="vace"), blocks=_CONTROLLED, attention=_ATTENTION),
)
