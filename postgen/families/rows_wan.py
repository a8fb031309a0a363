"""Layouts of Wan and of transformers derived from it: tokens frame by frame, cross-attention to the text."""

from __future__ import annotations

from typing import Any

from postgen.families.blocks import BlockGroup, Blocks
from postgen.families.layout import Call, Layout, video_row
from postgen.families.video_tokens import VideoTokens, grid_bcthw, grid_btchw

_MAIN = BlockGroup(names=r"blocks\.\d+")
_PLAIN = Blocks(groups=(_MAIN,))


def _frames_per_block(config: Any) -> int:
    """Return the frames per block of block-causal attention; 0 for full attention, whose config has 1."""
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
        # A control block returns a hint for a main block, and the control state for the next control block.
        BlockGroup(names=r"vace_blocks\.\d+", hidden="control_hidden_states", hidden_out=1),
        BlockGroup(
            names=r"blocks\.\d+",
            enters="the main blocks start from the video, not from the output of the control blocks",
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
    # An edited image is two latent frames; the reasoning steps use more.
    _wan_like(
        "ChronoEditTransformer3DModel",
        Call(extras="image_of_wan"),
        timestep_shapes=("B", "BL"),
        attention=_ATTENTION,
    ),
    # Tokens of long, middle and short history come first. Only their keys may be amplified, not those of the frames.
    _wan_like("HeliosTransformer3DModel", Call(extras="helios"), token_order="history-video"),
    _wan_like(
        "SkyReelsV2Transformer3DModel",
        Call(extras="skyreels"),
        timestep_shapes=("B", "BT"),
        causal_rule=_frames_per_block,
        attention=_ATTENTION,
        denoisers={"SkyReelsV2Pipeline": "postgen.families.wan:SkyReelsV2Denoiser"},
    ),
    # The reference image is the first frame. Face adapters attend within a frame only.
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
    # Reference images are the first frames. Methods change attention in the main blocks, not in the control blocks.
    _wan_like("WanVACETransformer3DModel", Call(extras="vace"), blocks=_CONTROLLED, attention=_ATTENTION),
)
