"""Lucy Edit, as in diffusers, with a keyword argument for each plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class LucyEditPipeline(DropIn, diffusers.LucyEditPipeline):
    """Editing of a video by text."""
