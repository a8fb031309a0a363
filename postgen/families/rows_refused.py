"""Reasons why some diffusers classes have no layout or no tokens. A registered row takes precedence over a reason."""

from postgen.families import rows_images

_CACHED = "it caches keys of earlier chunks, so queries and keys cover different frames"
_PACKED = "it packs text and video of the whole batch into one sequence without a batch axis"
_IMAGES = "it generates images, which have no frames to compare"
_UNDESCRIBED = "its layout does not describe the tokens of its picture"
_UNET = "it is a U-Net with temporal blocks, not a video transformer"

NO_VIDEO_TOKENS = {
    **{row.transformer: _IMAGES for row in rows_images.ROWS},
    "AnyFlowFARTransformer3DModel": _CACHED,
    "Cosmos3OmniTransformer": _PACKED,
    "I2VGenXLUNet": _UNET,
    "Kandinsky6SRTransformer3DModel": "its tiled sparse attention (flex attention only) has not been checked",
    "MiniMaxH3Transformer3DModel": _PACKED,
    "SanaVideoTransformer3DModel": "its self-attention is linear (ReLU), without a softmax over frames",
    "SanaWMLTX2RefinerTransformer3DModel": _CACHED,
    "SanaWMTransformer3DModel": "its self-attention is a gated delta rule, without a softmax over frames",
    "UNet2DConditionModel": _IMAGES,
    "UNet3DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
    "UNetSpatioTemporalConditionModel": _UNET,
    "WanAnimate2Transformer3DModel": _CACHED,
}
"""Reasons why a class has no (known) softmax attention over the frames of a video, by class name in diffusers."""

NO_TOKENS = {
    **NO_VIDEO_TOKENS,
    **{row.transformer: _UNDESCRIBED for row in rows_images.ROWS if row.image is None},
    "SanaTransformer2DModel": "its self-attention is linear (ReLU), without a softmax",
    "UNet2DConditionModel": "it is a U-Net, which has different tokens on every level",
}
"""Reasons why a class has no known tokens of a video or of a picture, by class name in diffusers."""

_BLOCKS_WITH_CACHES = "its blocks pass on caches of keys, which cannot be recorded"

NO_LAYOUT = {
    "AnyFlowFARTransformer3DModel": _BLOCKS_WITH_CACHES,
    "Cosmos3OmniTransformer": "its blocks take two packed sequences at a time and have not been described",
    "Kandinsky6SRTransformer3DModel": "its blocks attend by flex attention only and have not been checked",
    "MiniMaxH3Transformer3DModel": "its timesteps belong to noise levels of a packed sequence, not to samples",
    "SanaWMLTX2RefinerTransformer3DModel": _BLOCKS_WITH_CACHES,
    "SanaWMTransformer3DModel": "its timesteps have the shape (B, 1, T) and its blocks have not been checked",
    "WanAnimate2Transformer3DModel": _BLOCKS_WITH_CACHES,
}
"""Reasons why a class has no layout at all, by class name in diffusers."""
