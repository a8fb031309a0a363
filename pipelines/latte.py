"""Drop-in pipelines of Latte: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class LattePipeline(DropIn, diffusers.LattePipeline):
    """Text to video."""
