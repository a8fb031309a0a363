"""AnyFlow, as in diffusers, with a keyword argument for each plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class AnyFlowPipeline(DropIn, diffusers.AnyFlowPipeline):
    """Text to video, and image or video to video, in few steps."""
