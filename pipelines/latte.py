"""Latte, as in diffusers and with `enhance_a_video=`."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class LattePipeline(DropIn, diffusers.LattePipeline):
    """Text to video."""
