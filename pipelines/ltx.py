"""Drop-in pipelines of LTX-Video: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class LTXPipeline(DropIn, diffusers.LTXPipeline):
    """Text to video."""


class LTXImageToVideoPipeline(DropIn, diffusers.LTXImageToVideoPipeline):
    """Image to video."""


class LTXConditionPipeline(DropIn, diffusers.LTXConditionPipeline):
    """Text, images and videos at given frames to video."""


class LTXI2VLongMultiPromptPipeline(DropIn, diffusers.LTXI2VLongMultiPromptPipeline):
    """Image to long video, with one prompt per window."""
