"""Drop-in pipelines of HunyuanVideo 1.5: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class HunyuanVideo15Pipeline(DropIn, diffusers.HunyuanVideo15Pipeline):
    """Text to video."""


class HunyuanVideo15ImageToVideoPipeline(DropIn, diffusers.HunyuanVideo15ImageToVideoPipeline):
    """Image to video."""
