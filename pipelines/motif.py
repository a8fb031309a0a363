"""Motif-Video, as in diffusers and with `enhance_a_video=`."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class MotifVideoPipeline(DropIn, diffusers.MotifVideoPipeline):
    """Text to video."""


class MotifVideoImage2VideoPipeline(DropIn, diffusers.MotifVideoImage2VideoPipeline):
    """Image to video."""
