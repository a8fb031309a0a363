"""Drop-in pipelines of Wan 2.1 and 2.2: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class WanPipeline(DropIn, diffusers.WanPipeline):
    """Text to video."""


class WanImageToVideoPipeline(DropIn, diffusers.WanImageToVideoPipeline):
    """Image to video."""


class WanVideoToVideoPipeline(DropIn, diffusers.WanVideoToVideoPipeline):
    """Video to video."""


class WanVACEPipeline(DropIn, diffusers.WanVACEPipeline):
    """Video, mask and reference images to video."""


class WanAnimatePipeline(DropIn, diffusers.WanAnimatePipeline):
    """Character image and driving video to video."""
