"""Video models that have no layout, and why. A row registered by a third party wins over these."""

_CACHED = "it keeps keys of earlier chunks, so queries and keys cover different frames"
_PACKED = "it packs text and video of the whole batch into one sequence without a batch axis"
_IMAGES = "it makes images, there are no frames to compare"
_UNET = "it is a U-Net with temporal blocks, not a video transformer"

REFUSED = {
    "AnyFlowFARTransformer3DModel": _CACHED,
    "Cosmos3OmniTransformer": _PACKED,
    "I2VGenXLUNet": _UNET,
    "JoyImageEditPlusTransformer3DModel": _IMAGES,
    "JoyImageEditTransformer3DModel": _IMAGES,
    "Kandinsky6SRTransformer3DModel": "its tiled sparse attention (flex attention only) has not been checked",
    "MiniMaxH3Transformer3DModel": _PACKED,
    "SanaVideoTransformer3DModel": "its self-attention is linear (ReLU), there is no softmax over frames",
    "SanaWMLTX2RefinerTransformer3DModel": _CACHED,
    "SanaWMTransformer3DModel": "its self-attention is a gated delta rule, there is no softmax over frames",
    "UNet3DConditionModel": _UNET,
    "UNetMotionModel": _UNET,
    "UNetSpatioTemporalConditionModel": _UNET,
    "WanAnimate2Transformer3DModel": _CACHED,
}
"""Class name in diffusers -> what stands in the way."""
