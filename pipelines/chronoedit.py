"""ChronoEdit, as in diffusers, with a keyword argument for each plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class ChronoEditPipeline(DropIn, diffusers.ChronoEditPipeline):
    """Image editing as a short video."""
