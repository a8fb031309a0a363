"""Kandinsky 5 and 6, as in diffusers, with a keyword argument for each plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class Kandinsky5T2VPipeline(DropIn, diffusers.Kandinsky5T2VPipeline):
    """Text to video."""


class Kandinsky5I2VPipeline(DropIn, diffusers.Kandinsky5I2VPipeline):
    """Image to video."""


class Kandinsky6TI2VAPipeline(DropIn, diffusers.Kandinsky6TI2VAPipeline):
    """Text or image to video and audio."""
