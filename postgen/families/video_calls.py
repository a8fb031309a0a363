"""Playback rate, allowed sizes and fewest steps of each video pipeline of diffusers. Light to import.

The table has only facts that the signature of a pipeline's call does not contain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from postgen.families.wan_sizes import multiples

RANGES: Mapping[str, tuple[float, float]] = {
    "width": (1, 16384),
    "height": (1, 16384),
    "num_frames": (1, 100_000),
    "num_inference_steps": (1, 1_000_000),
    "fps": (0.01, 1000),
    "guidance_scale": (0, 1000),
    "true_cfg_scale": (0, 1000),
    "max_sequence_length": (1, 8192),
}
"""Smallest and largest value of each setting, for every model.

Values outside cause an overflow, a lack of memory or a picture of one colour.
"""

MOST_PIXELS = 2**35
"""Largest number of pixels in a clip: 400 GB in float32."""

Frames = Literal["first", "free"]
"""Rule of frame counts: t*n + 1 with t frames per latent frame (`first`), or any, which the pipeline may change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoCall:
    """One row of the table: facts about the call of a pipeline class."""

    fps: float = 8.0
    """Playback rate of its clips in frames per second, from diffusers' example of the class if that has one."""
    frames: Frames = "first"
    """Rule of the frame counts that it generates exactly."""
    pixels: int = 16
    """Number of which its call requires height and width to be multiples, besides autoencoder and patch size."""
    least_steps: int = 1
    """Fewest denoising steps that its schedule supports."""
    refused: str = ""
    """Reason why postgen refuses the class; empty if it does not."""
    image_optional: bool = False
    """Whether the class takes a first frame but can also generate from text alone."""


# Models that extend a U-Net for images (AnimateDiff, ModelScope, I2VGen-XL). Their examples write a GIF without a
# rate: 8 frames per second is usual for short clips.
_MOTION = VideoCall(frames="free", pixels=8)
_HUNYUAN = VideoCall(fps=15)
_COGVIDEOX = VideoCall(fps=8, pixels=8)
_WAN = VideoCall(fps=16)
_SKYREELS = VideoCall(fps=24)
# The example passes 25 to the network and plays at 24. Here both are 25, the default of the call.
_LTX = VideoCall(fps=25, pixels=32)
_LTX2 = VideoCall(fps=24, pixels=32)
_KANDINSKY = VideoCall(fps=24)
# Its authors write 121 frames at 24 (generate.py of github.com/Tencent-Hunyuan/HunyuanVideo-1.5), and so does
# diffusers' example with a first frame. Its example from text has 15, copied from HunyuanVideo.
_HUNYUAN_15 = VideoCall(fps=24, pixels=1)
_EASYANIMATE = VideoCall(fps=8)

_TILES = "its autoencoder decodes in tiles only, and areas outside the tiles stay grey"

ROWS: Mapping[str, VideoCall] = {
    "AllegroPipeline": VideoCall(fps=15, frames="free", pixels=8, refused=_TILES),
    "AnimateDiffControlNetPipeline": _MOTION,
    "AnimateDiffPAGPipeline": _MOTION,
    "AnimateDiffPipeline": _MOTION,
    "AnimateDiffSDXLPipeline": _MOTION,
    "AnimateDiffSparseControlNetPipeline": _MOTION,
    "AnyFlowFARPipeline": _WAN,
    "AnyFlowPipeline": _WAN,
    "ChronoEditPipeline": _WAN,
    "CogVideoXImageToVideoPipeline": _COGVIDEOX,
    "CogVideoXPipeline": _COGVIDEOX,
    "ConsisIDPipeline": _COGVIDEOX,
    "Cosmos2VideoToWorldPipeline": VideoCall(fps=16),
    "Cosmos2_5_PredictBasePipeline": VideoCall(fps=16, image_optional=True),
    "Cosmos2_5_TransferPipeline": VideoCall(fps=30, frames="free"),
    "Cosmos3OmniPipeline": VideoCall(fps=24, image_optional=True),
    "CosmosTextToWorldPipeline": VideoCall(fps=30),
    "CosmosVideoToWorldPipeline": VideoCall(fps=30),
    "EasyAnimateControlPipeline": _EASYANIMATE,
    "EasyAnimateInpaintPipeline": _EASYANIMATE,
    "EasyAnimatePipeline": _EASYANIMATE,
    # Both Helios classes generate whole sections, so the number of sections determines the number of frames.
    "HeliosPipeline": VideoCall(fps=24, frames="free", image_optional=True),
    "HeliosPyramidPipeline": VideoCall(fps=24, frames="free", image_optional=True),
    "HunyuanVideoFramepackPipeline": VideoCall(fps=30, frames="free"),
    "HunyuanSkyreelsImageToVideoPipeline": _HUNYUAN,
    "HunyuanVideo15ImageToVideoPipeline": _HUNYUAN_15,
    "HunyuanVideo15Pipeline": _HUNYUAN_15,
    "HunyuanVideoImageToVideoPipeline": _HUNYUAN,
    "HunyuanVideoPipeline": _HUNYUAN,
    "I2VGenXLPipeline": _MOTION,
    "Kandinsky5I2VPipeline": _KANDINSKY,
    "Kandinsky5T2VPipeline": _KANDINSKY,
    "Kandinsky6TI2VAPipeline": VideoCall(fps=24, image_optional=True),
    "LTX2ConditionPipeline": _LTX2,
    "LTX2DFRPipeline": _LTX2,
    "LTX2DFRTemporalRefinePipeline": _LTX2,
    "LTX2HDRPipeline": _LTX2,
    "LTX2ImageToVideoPipeline": _LTX2,
    "LTX2InContextPipeline": _LTX2,
    "LTX2LatentUpsamplePipeline": _LTX2,
    "LTX2Pipeline": _LTX2,
    # Its schedule has a linear and a quadratic half, with at least one step each.
    "LTXConditionPipeline": VideoCall(fps=25, pixels=32, least_steps=2, image_optional=True),
    "LTXI2VLongMultiPromptPipeline": _LTX,
    "LTXImageToVideoPipeline": _LTX,
    "LTXPipeline": _LTX,
    "LucyEditPipeline": VideoCall(fps=24),
    # Steps as in LTXConditionPipeline. The example has no rate; the model's page in diffusers says 30.
    "MochiPipeline": VideoCall(fps=30, pixels=8, least_steps=2),
    "MotifVideoImage2VideoPipeline": VideoCall(fps=24, pixels=1),
    "MotifVideoPipeline": VideoCall(fps=24, pixels=1),
    "PIAPipeline": _MOTION,
    "SanaWMPipeline": VideoCall(fps=16, frames="free", pixels=32),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": _SKYREELS,
    "SkyReelsV2DiffusionForcingPipeline": _SKYREELS,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": _SKYREELS,
    "SkyReelsV2ImageToVideoPipeline": _SKYREELS,
    "SkyReelsV2Pipeline": _SKYREELS,
    "StableVideoDiffusionPipeline": VideoCall(fps=7, frames="free", pixels=8),
    "TextToVideoSDPipeline": _MOTION,
    "WanImageToVideoPipeline": _WAN,
    "WanPipeline": _WAN,
    "WanVACEPipeline": _WAN,
}
"""Rows of all pipeline classes of diffusers that take a number of frames, by class name."""

UNKNOWN = VideoCall(frames="free", pixels=1)
"""Row of unknown classes; their own call checks its arguments."""


def rate_of(pipeline: str, index: Mapping[str, Any], network: Mapping[str, Any]) -> float:
    """Return the playback rate of a model in frames per second; for some classes it depends on the model.

    Args:
        pipeline: name of its pipeline class.
        index: content of its `model_index.json`.
        network: config of its transformer; empty if it has none.
    """
    if pipeline in ("WanPipeline", "WanImageToVideoPipeline") and index.get("expand_timesteps") is True:
        return 24.0  # Wan2.2-TI2V-5B
    if pipeline in ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline") and network.get("patch_size_t"):
        return 16.0  # CogVideoX 1.5: "Frame Rate: 16 frames/second" (model card of THUDM/CogVideoX1.5-5B)
    return ROWS.get(pipeline, UNKNOWN).fps


def sizes_of(pipeline: str, vae: Mapping[str, Any], network: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return the numbers of which height, width and frames - 1 must be multiples; None if they are unknown.

    Args:
        pipeline: name of the pipeline class.
        vae: config of its autoencoder; empty if it has none.
        network: config of its transformer or U-Net; empty if it has neither.
    """
    row = ROWS.get(pipeline)
    try:
        scales = _scales(vae)
        if row is None or scales is None:
            return None
        space, time = scales
        rows, columns, step = multiples(space, time, _patch(network), row.pixels)
    except (KeyError, TypeError, ValueError):  # loading the model reports errors in a config
        return None
    # All classes except Wan pad the frames to whole patches.
    step = step if row is _WAN else time
    return rows, columns, 1 if row.frames == "free" else step


def least_steps(pipeline: str, scheduler: Mapping[str, Any]) -> int:
    """Return the fewest denoising steps of a pipeline class with a scheduler of this config."""
    # `shift_terminal` divides by the difference of the first and the last noise level, which is 0 with one step.
    stretched = 2 if scheduler.get("shift_terminal") else 1
    return max(stretched, ROWS.get(pipeline, UNKNOWN).least_steps)


def _patch(network: Mapping[str, Any]) -> Sequence[int]:
    size = network.get("patch_size") or 1
    if isinstance(size, int):
        return 1, size, size
    return tuple(size) if len(size) == 3 else (1, size[-2], size[-1])


def _scales(vae: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the autoencoder's compression: pixels per latent pixel along each side, frames per latent frame."""
    kind = vae.get("_class_name")
    if kind == "AutoencoderKLMochi":
        return 8, 6  # constants of the pipeline
    blocks = len(vae.get("block_out_channels", ()))
    if kind == "AutoencoderKLMagvit":
        return 2 ** (blocks - 1), 2 ** (blocks - 2)
    if kind in ("AutoencoderKL", "AutoencoderKLTemporalDecoder"):
        return 2 ** (blocks - 1), 1
    if kind == "AutoencoderKLCogVideoX":
        # It decodes pairs of latent frames. An even number of latent frames decodes to 4n frames instead of 4n + 1.
        return 2 ** (blocks - 1), 2 * int(vae.get("temporal_compression_ratio", 4))
    if kind == "AutoencoderKLLTXVideo":
        halvings = sum(vae["spatio_temporal_scaling"])
        space = vae.get("spatial_compression_ratio") or vae["patch_size"] * 2**halvings
        return space, vae.get("temporal_compression_ratio") or vae["patch_size_t"] * 2**halvings
    if kind == "AutoencoderKLWan":
        return vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    space, time = vae.get("spatial_compression_ratio"), vae.get("temporal_compression_ratio")
    return (int(space), int(time)) if space and time else None
