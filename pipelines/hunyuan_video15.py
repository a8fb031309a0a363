"""HunyuanVideo 1.5, as in diffusers, with a keyword argument for each plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class HunyuanVideo15Pipeline(DropIn, diffusers.HunyuanVideo15Pipeline):
    """Text to video."""


class HunyuanVideo15ImageToVideoPipeline(DropIn, diffusers.HunyuanVideo15ImageToVideoPipeline):
    """Image to video."""
