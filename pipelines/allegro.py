"""Allegro, as in diffusers, with a keyword argument for each plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class AllegroPipeline(DropIn, diffusers.AllegroPipeline):
    """Text to video."""
