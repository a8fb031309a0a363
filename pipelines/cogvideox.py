"""Drop-in pipelines of CogVideoX: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class CogVideoXPipeline(DropIn, diffusers.CogVideoXPipeline):
    """Text to video."""


class CogVideoXImageToVideoPipeline(DropIn, diffusers.CogVideoXImageToVideoPipeline):
    """Image to video."""


class CogVideoXVideoToVideoPipeline(DropIn, diffusers.CogVideoXVideoToVideoPipeline):
    """Video to video."""


class CogVideoXFunControlPipeline(DropIn, diffusers.CogVideoXFunControlPipeline):
    """Text and a control video to video."""
