"""Drop-in pipelines of Allegro: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class AllegroPipeline(DropIn, diffusers.AllegroPipeline):
    """Text to video."""
