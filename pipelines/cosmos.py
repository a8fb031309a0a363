"""Drop-in pipelines of Cosmos: the diffusers classes with one more keyword argument per plug-in."""

import diffusers

from postgen.pipelines.drop_in import DropIn


class CosmosTextToWorldPipeline(DropIn, diffusers.CosmosTextToWorldPipeline):
    """Text to video."""


class CosmosVideoToWorldPipeline(DropIn, diffusers.CosmosVideoToWorldPipeline):
    """Image or video to video."""


class Cosmos2VideoToWorldPipeline(DropIn, diffusers.Cosmos2VideoToWorldPipeline):
    """Image or video to video, second generation."""


class Cosmos2_5_PredictBasePipeline(DropIn, diffusers.Cosmos2_5_PredictBasePipeline):
    """Text, image or video to video, generation 2.5."""


class Cosmos2_5_TransferPipeline(DropIn, diffusers.Cosmos2_5_TransferPipeline):
    """Text and a control video to video, generation 2.5."""
