"""What is not known of some models of diffusers, by capability, and why. A row registered by a third party wins."""

from postgen.families import rows_images

_CACHED = "it keeps keys of earlier chunks, so queries and keys cover different frames"
_PACKED = "it packs text and video of the whole batch into one sequence without a batch axis"
_IMAGES = "it makes images, there are no frames to compare"
_UNDESCRIBED = "where those of its picture are has not been described"
_UNET = "it is a U-Net with temporal blocks, not a video transformer"

NO_VIDEO_TOKENS = {
    **{row.transformer: _IMAGES for row in rows_images.ROWS},
    "AnyFlowFARTransformer3DModel": _CACHED,
    "Cosmos3OmniTransformer": _PACKED,
    "I2VGenXLUNet": _UNET,
    "Kandinsky6SRTransformer3DModel": "its tiled sparse attention (flex attention only) has not been checked",
    "MiniMaxH3Transformer3DModel": _PACKED,
    "SanaVideoTransformer3DModel": "its self-attention is linear (ReLU), there is no softmax over frames",
    "SanaWMLTX2RefinerTransformer3DModel": _CACHED,
    "SanaWMTransformer3DModel": "its self-attention is a gated delta rule, there is no softmax over frames",
    "UNet2DConditionModel": _IMAGES,
    "UNet3DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
    "UNetSpatioTemporalConditionModel": _UNET,
    "WanAnimate2Transformer3DModel": _CACHED,
}
"""Class name in diffusers -> why there is no softmax attention over the frames of a video, or none that is known."""

NO_TOKENS = {
    **NO_VIDEO_TOKENS,
    **{row.transformer: _UNDESCRIBED for row in rows_images.ROWS if row.image is None},
    "SanaTransformer2DModel": "its self-attention is linear (ReLU), there is no softmax",
    "UNet2DConditionModel": "it is a U-Net, whose tokens are others on every level",
}
"""Class name in diffusers -> why it is not known where the tokens are, of a video or of a picture."""

_BLOCKS_WITH_CACHES = "its blocks hand caches of keys on, which cannot be recorded"

NO_LAYOUT = {
    "AnyFlowFARTransformer3DModel": _BLOCKS_WITH_CACHES,
    "Cosmos3OmniTransformer": "its blocks take two packed sequences at a time and have not been described",
    "Kandinsky6SRTransformer3DModel": "its blocks attend by flex attention only and have not been checked",
    "MiniMaxH3Transformer3DModel": "its timesteps belong to noise levels of a packed sequence, not to samples",
    "SanaWMLTX2RefinerTransformer3DModel": _BLOCKS_WITH_CACHES,
    "SanaWMTransformer3DModel": "its timesteps have the shape (B, 1, T) and its blocks have not been checked",
    "WanAnimate2Transformer3DModel": _BLOCKS_WITH_CACHES,
}
"""Class name in diffusers -> why not even its blocks are known."""
