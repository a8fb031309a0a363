"""EasyAnimate, as in diffusers, with a keyword argument for each plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class EasyAnimatePipeline(DropIn, diffusers.EasyAnimatePipeline):
    """Text to video."""


class EasyAnimateControlPipeline(DropIn, diffusers.EasyAnimateControlPipeline):
    """Control video to video."""


class EasyAnimateInpaintPipeline(DropIn, diffusers.EasyAnimateInpaintPipeline):
    """Image or masked video to video."""
