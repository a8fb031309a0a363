"""Mochi, as in diffusers and with `enhance_a_video=`."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class MochiPipeline(DropIn, diffusers.MochiPipeline):
    """Text to video."""
