"""Drop-in diffusers pipelines: the same names, call arguments and folders, plus one keyword argument per plug-in.

    from postgen.pipelines import WanPipeline  # instead of: from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    pipe("a red ball rolls left", enhance_a_video="auto")

A class is imported on first access, together with the module of its family only.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postgen.pipelines.names import homes

if TYPE_CHECKING:
    from postgen.pipelines.allegro import AllegroPipeline as AllegroPipeline
    from postgen.pipelines.anyflow import AnyFlowPipeline as AnyFlowPipeline
    from postgen.pipelines.chronoedit import ChronoEditPipeline as ChronoEditPipeline
    from postgen.pipelines.cogvideox import CogVideoXFunControlPipeline as CogVideoXFunControlPipeline
    from postgen.pipelines.cogvideox import CogVideoXImageToVideoPipeline as CogVideoXImageToVideoPipeline
    from postgen.pipelines.cogvideox import CogVideoXPipeline as CogVideoXPipeline
    from postgen.pipelines.cogvideox import CogVideoXVideoToVideoPipeline as CogVideoXVideoToVideoPipeline
    from postgen.pipelines.consisid import ConsisIDPipeline as ConsisIDPipeline
    from postgen.pipelines.cosmos import Cosmos2_5_PredictBasePipeline as Cosmos2_5_PredictBasePipeline
    from postgen.pipelines.cosmos import Cosmos2_5_TransferPipeline as Cosmos2_5_TransferPipeline
    from postgen.pipelines.cosmos import Cosmos2VideoToWorldPipeline as Cosmos2VideoToWorldPipeline
    from postgen.pipelines.cosmos import CosmosTextToWorldPipeline as CosmosTextToWorldPipeline
    from postgen.pipelines.cosmos import CosmosVideoToWorldPipeline as CosmosVideoToWorldPipeline
    from postgen.pipelines.easyanimate import EasyAnimateControlPipeline as EasyAnimateControlPipeline
    from postgen.pipelines.easyanimate import EasyAnimateInpaintPipeline as EasyAnimateInpaintPipeline
    from postgen.pipelines.easyanimate import EasyAnimatePipeline as EasyAnimatePipeline
    from postgen.pipelines.helios import HeliosPipeline as HeliosPipeline
    from postgen.pipelines.helios import HeliosPyramidPipeline as HeliosPyramidPipeline
    from postgen.pipelines.hunyuan_video import (
        HunyuanSkyreelsImageToVideoPipeline as HunyuanSkyreelsImageToVideoPipeline,
    )
    from postgen.pipelines.hunyuan_video import HunyuanVideoFramepackPipeline as HunyuanVideoFramepackPipeline
    from postgen.pipelines.hunyuan_video import HunyuanVideoImageToVideoPipeline as HunyuanVideoImageToVideoPipeline
    from postgen.pipelines.hunyuan_video import HunyuanVideoPipeline as HunyuanVideoPipeline
    from postgen.pipelines.hunyuan_video15 import (
        HunyuanVideo15ImageToVideoPipeline as HunyuanVideo15ImageToVideoPipeline,
    )
    from postgen.pipelines.hunyuan_video15 import HunyuanVideo15Pipeline as HunyuanVideo15Pipeline
    from postgen.pipelines.kandinsky import Kandinsky5I2VPipeline as Kandinsky5I2VPipeline
    from postgen.pipelines.kandinsky import Kandinsky5T2VPipeline as Kandinsky5T2VPipeline
    from postgen.pipelines.kandinsky import Kandinsky6TI2VAPipeline as Kandinsky6TI2VAPipeline
    from postgen.pipelines.latte import LattePipeline as LattePipeline
    from postgen.pipelines.ltx import LTXConditionPipeline as LTXConditionPipeline
    from postgen.pipelines.ltx import LTXI2VLongMultiPromptPipeline as LTXI2VLongMultiPromptPipeline
    from postgen.pipelines.ltx import LTXImageToVideoPipeline as LTXImageToVideoPipeline
    from postgen.pipelines.ltx import LTXPipeline as LTXPipeline
    from postgen.pipelines.ltx2 import LTX2ConditionPipeline as LTX2ConditionPipeline
    from postgen.pipelines.ltx2 import LTX2DFRPipeline as LTX2DFRPipeline
    from postgen.pipelines.ltx2 import LTX2DFRTemporalRefinePipeline as LTX2DFRTemporalRefinePipeline
    from postgen.pipelines.ltx2 import LTX2HDRPipeline as LTX2HDRPipeline
    from postgen.pipelines.ltx2 import LTX2ImageToVideoPipeline as LTX2ImageToVideoPipeline
    from postgen.pipelines.ltx2 import LTX2InContextPipeline as LTX2InContextPipeline
    from postgen.pipelines.ltx2 import LTX2Pipeline as LTX2Pipeline
    from postgen.pipelines.lucy import LucyEditPipeline as LucyEditPipeline
    from postgen.pipelines.mochi import MochiPipeline as MochiPipeline
    from postgen.pipelines.motif import MotifVideoImage2VideoPipeline as MotifVideoImage2VideoPipeline
    from postgen.pipelines.motif import MotifVideoPipeline as MotifVideoPipeline
    from postgen.pipelines.skyreels_v2 import (
        SkyReelsV2DiffusionForcingImageToVideoPipeline as SkyReelsV2DiffusionForcingImageToVideoPipeline,
    )
    from postgen.pipelines.skyreels_v2 import SkyReelsV2DiffusionForcingPipeline as SkyReelsV2DiffusionForcingPipeline
    from postgen.pipelines.skyreels_v2 import (
        SkyReelsV2DiffusionForcingVideoToVideoPipeline as SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    )
    from postgen.pipelines.skyreels_v2 import SkyReelsV2ImageToVideoPipeline as SkyReelsV2ImageToVideoPipeline
    from postgen.pipelines.skyreels_v2 import SkyReelsV2Pipeline as SkyReelsV2Pipeline
    from postgen.pipelines.wan import WanAnimatePipeline as WanAnimatePipeline
    from postgen.pipelines.wan import WanImageToVideoPipeline as WanImageToVideoPipeline
    from postgen.pipelines.wan import WanPipeline as WanPipeline
    from postgen.pipelines.wan import WanVACEPipeline as WanVACEPipeline
    from postgen.pipelines.wan import WanVideoToVideoPipeline as WanVideoToVideoPipeline

_HOMES = homes(Path(__file__).parent)
"""Module of its family by class name."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a pipeline class from the module of its family on first access."""
    if name not in _HOMES:
        raise AttributeError(f"module 'postgen.pipelines' has no attribute {name!r}. It has: {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
