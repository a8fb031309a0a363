"""Drop-in pipelines of Kandinsky 5 and 6: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class Kandinsky5T2VPipeline(DropIn, diffusers.Kandinsky5T2VPipeline):
    """Text to video."""


class Kandinsky5I2VPipeline(DropIn, diffusers.Kandinsky5I2VPipeline):
    """Image to video."""


class Kandinsky6TI2VAPipeline(DropIn, diffusers.Kandinsky6TI2VAPipeline):
    """Text or image to video and audio."""
