"""Allegro, as in diffusers and with `enhance_a_video=`."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class AllegroPipeline(DropIn, diffusers.AllegroPipeline):
    """Text to video."""
