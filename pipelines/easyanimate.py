"""Drop-in pipelines of EasyAnimate: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class EasyAnimatePipeline(DropIn, diffusers.EasyAnimatePipeline):
    """Text to video."""


class EasyAnimateControlPipeline(DropIn, diffusers.EasyAnimateControlPipeline):
    """Text and a control video to video."""


class EasyAnimateInpaintPipeline(DropIn, diffusers.EasyAnimateInpaintPipeline):
    """Image or masked video to video."""
