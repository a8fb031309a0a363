"""AnyFlow, as in diffusers and with `enhance_a_video=`."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class AnyFlowPipeline(DropIn, diffusers.AnyFlowPipeline):
    """Text to video, and image or video to video, in few steps."""
