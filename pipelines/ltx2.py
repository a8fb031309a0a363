"""Drop-in pipelines of LTX-2: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class LTX2Pipeline(DropIn, diffusers.LTX2Pipeline):
    """Text to video and audio."""


class LTX2ImageToVideoPipeline(DropIn, diffusers.LTX2ImageToVideoPipeline):
    """Image to video and audio."""


class LTX2ConditionPipeline(DropIn, diffusers.LTX2ConditionPipeline):
    """Images and videos at given frames to video and audio."""


class LTX2InContextPipeline(DropIn, diffusers.LTX2InContextPipeline):
    """Reference videos to video and audio."""


class LTX2HDRPipeline(DropIn, diffusers.LTX2HDRPipeline):
    """Video to video of high dynamic range."""


class LTX2DFRPipeline(DropIn, diffusers.LTX2DFRPipeline):
    """Text or image to video of high frame rate."""


class LTX2DFRTemporalRefinePipeline(DropIn, diffusers.LTX2DFRTemporalRefinePipeline):
    """Temporal refinement of a video of high frame rate."""
