"""ChronoEdit, as in diffusers and with `enhance_a_video=`."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class ChronoEditPipeline(DropIn, diffusers.ChronoEditPipeline):
    """Image editing as a short video."""
