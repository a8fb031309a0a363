"""Layouts of U-Nets: down, middle and up blocks."""

from __future__ import annotations

from postgen.families.blocks import BlockGroup, Blocks
from postgen.families.layout import Layout

_SKIPS = "the up blocks also take the outputs of the down blocks (skip connections)"

_UNET = Blocks(
    groups=(
        BlockGroup(names=r"down_blocks\.\d+", hidden_out=0),
        BlockGroup(names=r"mid_block"),
        BlockGroup(names=r"up_blocks\.\d+", enters=_SKIPS, breaks=_SKIPS),
    )
)
"""Blocks without cross-attention take no text."""

_DENOISERS = {
    "UNet2DConditionModel": {
        "StableDiffusionPipeline": "postgen.families.stable_diffusion:StableDiffusionDenoiser",
        "StableDiffusionXLPipeline": "postgen.families.stable_diffusion:StableDiffusionXLDenoiser",
    }
}

ROWS = tuple(
    Layout(transformer=name, blocks=_UNET, denoisers=_DENOISERS.get(name, {}))
    for name in (
        "I2VGenXLUNet",
        "UNet2DConditionModel",
        "UNet3DConditionModel",
        "UNetMotionModel",
        "UNetSpatioTemporalConditionModel",
    )
)
