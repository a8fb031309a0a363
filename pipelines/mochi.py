"""Drop-in pipelines of Mochi: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class MochiPipeline(DropIn, diffusers.MochiPipeline):
    """Text to video."""
