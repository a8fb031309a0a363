"""Drop-in pipelines of Helios: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class HeliosPipeline(DropIn, diffusers.HeliosPipeline):
    """Text, image or video to video of any length."""


class HeliosPyramidPipeline(DropIn, diffusers.HeliosPyramidPipeline):
    """Text, image or video to video of any length, in stages of growing resolution."""
