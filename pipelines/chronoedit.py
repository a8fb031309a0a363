"""Drop-in pipelines of ChronoEdit: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class ChronoEditPipeline(DropIn, diffusers.ChronoEditPipeline):
    """Image editing, computed as a short video."""
