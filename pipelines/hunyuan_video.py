"""Drop-in pipelines of HunyuanVideo: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class HunyuanVideoPipeline(DropIn, diffusers.HunyuanVideoPipeline):
    """Text to video."""


class HunyuanVideoImageToVideoPipeline(DropIn, diffusers.HunyuanVideoImageToVideoPipeline):
    """Image to video."""


class HunyuanSkyreelsImageToVideoPipeline(DropIn, diffusers.HunyuanSkyreelsImageToVideoPipeline):
    """Image to video, for the SkyReels models."""


class HunyuanVideoFramepackPipeline(DropIn, diffusers.HunyuanVideoFramepackPipeline):
    """Image to video of any length."""
