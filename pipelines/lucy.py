"""Drop-in pipelines of Lucy Edit: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class LucyEditPipeline(DropIn, diffusers.LucyEditPipeline):
    """Video editing guided by text."""
