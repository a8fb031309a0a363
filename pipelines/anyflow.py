"""Drop-in pipelines of AnyFlow: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class AnyFlowPipeline(DropIn, diffusers.AnyFlowPipeline):
    """Text to video, and image or video to video, in few steps."""
