"""HunyuanVideo, as in diffusers, with a keyword argument for each plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class HunyuanVideoPipeline(DropIn, diffusers.HunyuanVideoPipeline):
    """Text to video."""


class HunyuanVideoImageToVideoPipeline(DropIn, diffusers.HunyuanVideoImageToVideoPipeline):
    """Image to video."""


class HunyuanSkyreelsImageToVideoPipeline(DropIn, diffusers.HunyuanSkyreelsImageToVideoPipeline):
    """Image to video, the SkyReels models."""


class HunyuanVideoFramepackPipeline(DropIn, diffusers.HunyuanVideoFramepackPipeline):
    """Image to video of any length."""
