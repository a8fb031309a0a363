"""Drop-in pipelines of Motif-Video: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class MotifVideoPipeline(DropIn, diffusers.MotifVideoPipeline):
    """Text to video."""


class MotifVideoImage2VideoPipeline(DropIn, diffusers.MotifVideoImage2VideoPipeline):
    """Image to video."""
