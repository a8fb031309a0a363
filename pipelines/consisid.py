"""ConsisID, as in diffusers and with `enhance_a_video=`."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class ConsisIDPipeline(DropIn, diffusers.ConsisIDPipeline):
    """Face and text to video."""
