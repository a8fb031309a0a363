"""Drop-in pipelines of SkyReels-V2: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class SkyReelsV2Pipeline(DropIn, diffusers.SkyReelsV2Pipeline):
    """Text to video."""


class SkyReelsV2ImageToVideoPipeline(DropIn, diffusers.SkyReelsV2ImageToVideoPipeline):
    """Image to video."""


class SkyReelsV2DiffusionForcingPipeline(DropIn, diffusers.SkyReelsV2DiffusionForcingPipeline):
    """Text to long video."""


class SkyReelsV2DiffusionForcingImageToVideoPipeline(DropIn, diffusers.SkyReelsV2DiffusionForcingImageToVideoPipeline):
    """Image to long video."""


class SkyReelsV2DiffusionForcingVideoToVideoPipeline(DropIn, diffusers.SkyReelsV2DiffusionForcingVideoToVideoPipeline):
    """Continuation of a video."""
