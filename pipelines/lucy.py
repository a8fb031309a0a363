"""Lucy Edit, as in diffusers and with `enhance_a_video=`."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class LucyEditPipeline(DropIn, diffusers.LucyEditPipeline):
    """Editing of a video by text."""
