"""Drop-in pipelines of ConsisID: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class ConsisIDPipeline(DropIn, diffusers.ConsisIDPipeline):
    """Face and text to video."""
