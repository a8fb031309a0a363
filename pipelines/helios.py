"""Helios, as in diffusers, with a keyword argument for each plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class HeliosPipeline(DropIn, diffusers.HeliosPipeline):
    """Text, image or video to video of any length."""


class HeliosPyramidPipeline(DropIn, diffusers.HeliosPyramidPipeline):
    """The same in stages of growing resolution."""
