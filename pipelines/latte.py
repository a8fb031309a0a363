"""Latte, as in diffusers, with a keyword argument for each plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class LattePipeline(DropIn, diffusers.LattePipeline):
    """Text to video."""
