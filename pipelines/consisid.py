"""ConsisID, as in diffusers, with a keyword argument for each plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class ConsisIDPipeline(DropIn, diffusers.ConsisIDPipeline):
    """Face and text to video."""
