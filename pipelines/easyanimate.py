"""EasyAnimate, as in diffusers and with `enhance_a_video=`."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class EasyAnimatePipeline(DropIn, diffusers.EasyAnimatePipeline):
    """Text to video."""


class EasyAnimateControlPipeline(DropIn, diffusers.EasyAnimateControlPipeline):
    """Control video to video."""


class EasyAnimateInpaintPipeline(DropIn, diffusers.EasyAnimateInpaintPipeline):
    """Image or masked video to video."""
