"""What the call of each video pipeline of diffusers takes: playback rate, sizes, the fewest steps. Light to import.

What a signature says (which settings there are, their defaults) is not repeated here; this is what it does not say.
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
"""Least and largest value of a setting, whatever the model: beyond it lie no video, but an overflow, no memory, or a
picture of one colour."""

MOST_PIXELS = 2**35
"""Of a clip: 400 GB as float32."""

Frames = Literal["first", "free"]
"""Of a clip, with t frames in a latent frame: t*n + 1, or whatever the pipeline makes of a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoCall:
    """One row: how a pipeline class is called."""

    fps: float = 8.0
    """Frames per second at which its clips play: what diffusers' example of the class writes, where it says one."""
    frames: Frames = "first"
    """Numbers of frames that it makes as asked."""
    pixels: int = 16
    """What its call wants height and width to divide by, beside what autoencoder and patches want."""
    least_steps: int = 1
    """Fewest denoising steps that its own schedule has."""
    refused: str = ""
    """Why it makes no video here."""
    image_optional: bool = False
    """Whether it makes video from text alone too, although it takes a first frame."""


# Networks on a U-Net of images (AnimateDiff, ModelScope, I2VGen-XL). Their examples write a GIF and name no rate: ours
# is the usual one of short clips, 8 frames per second.
_MOTION = VideoCall(frames="free", pixels=8)
_HUNYUAN = VideoCall(fps=15)
_COGVIDEOX = VideoCall(fps=8, pixels=8)
_WAN = VideoCall(fps=16)
_SKYREELS = VideoCall(fps=24)
# The example plays at 24 what the network was told is 25: here both are the default of the call.
_LTX = VideoCall(fps=25, pixels=32)
_LTX2 = VideoCall(fps=24, pixels=32)
_KANDINSKY = VideoCall(fps=24)
# Its authors write 121 frames at 24 (generate.py of github.com/Tencent-Hunyuan/HunyuanVideo-1.5), as does diffusers'
# example from a first frame; that from text was taken over from HunyuanVideo, with 15.
_HUNYUAN_15 = VideoCall(fps=24, pixels=1)
_EASYANIMATE = VideoCall(fps=8)

_TILES = "its autoencoder decodes in tiles only, and leaves grey what they do not cover"

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
    # Both work in sections, and make as many frames as these hold.
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
    # Its steps are half linear, half quadratic: there are two halves.
    "LTXConditionPipeline": VideoCall(fps=25, pixels=32, least_steps=2, image_optional=True),
    "LTXI2VLongMultiPromptPipeline": _LTX,
    "LTXImageToVideoPipeline": _LTX,
    "LTXPipeline": _LTX,
    "LucyEditPipeline": VideoCall(fps=24),
    # As LTXCondition. The example names no rate; the model makes 30 a second (its documentation in diffusers).
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
"""Every pipeline class of diffusers that takes a number of frames."""

UNKNOWN = VideoCall(frames="free", pixels=1)
"""A class without a row: its call refuses what it cannot make."""


def rate_of(pipeline: str, index: Mapping[str, Any], network: Mapping[str, Any]) -> float:
    """Return the frames per second of a model; two classes serve models of two rates each.

    Args:
        pipeline: its class.
        index: content of its `model_index.json`.
        network: configuration of its transformer; empty where it has none.
    """
    if pipeline in ("WanPipeline", "WanImageToVideoPipeline") and index.get("expand_timesteps") is True:
        return 24.0  # Wan2.2-TI2V-5B
    if pipeline in ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline") and network.get("patch_size_t"):
        return 16.0  # CogVideoX 1.5: "Frame Rate: 16 frames/second" (model card of THUDM/CogVideoX1.5-5B)
    return ROWS.get(pipeline, UNKNOWN).fps


def sizes_of(pipeline: str, vae: Mapping[str, Any], network: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return what height, width and frames - 1 must divide by; None where that is not known.

    Args:
        pipeline: a class.
        vae: configuration of its autoencoder; empty where it has none of its own.
        network: configuration of its transformer or U-Net; empty where it has neither.
    """
    row = ROWS.get(pipeline)
    try:
        scales = _scales(vae)
        if row is None or scales is None:
            return None
        space, time = scales
        rows, columns, step = multiples(space, time, _patch(network), row.pixels)
    except (KeyError, TypeError, ValueError):  # what is wrong with a configuration, loading it tells
        return None
    # Patches of several frames are padded, but in Wan.
    step = step if row is _WAN else time
    return rows, columns, 1 if row.frames == "free" else step


def least_steps(pipeline: str, scheduler: Mapping[str, Any]) -> int:
    """Return the fewest steps of a pipeline class with a scheduler of this configuration."""
    # Stretching a schedule to its end divides by the distance of its first and its last noise level.
    stretched = 2 if scheduler.get("shift_terminal") else 1
    return max(stretched, ROWS.get(pipeline, UNKNOWN).least_steps)


def _patch(network: Mapping[str, Any]) -> Sequence[int]:
    size = network.get("patch_size") or 1
    if isinstance(size, int):
        return 1, size, size
    return tuple(size) if len(size) == 3 else (1, size[-2], size[-1])


def _scales(vae: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return pixels a side of a latent pixel, and what frames (but the first) come in."""
    kind = vae.get("_class_name")
    if kind == "AutoencoderKLMochi":
        return 8, 6  # the pipeline's own numbers
    blocks = len(vae.get("block_out_channels", ()))
    if kind == "AutoencoderKLMagvit":
        return 2 ** (blocks - 1), 2 ** (blocks - 2)
    if kind in ("AutoencoderKL", "AutoencoderKLTemporalDecoder"):
        return 2 ** (blocks - 1), 1
    if kind == "AutoencoderKLCogVideoX":
        # It decodes pairs of latents, and makes 4n frames instead of 4n + 1 where no single one is left.
        return 2 ** (blocks - 1), 2 * int(vae.get("temporal_compression_ratio", 4))
    if kind == "AutoencoderKLLTXVideo":
        halvings = sum(vae["spatio_temporal_scaling"])
        space = vae.get("spatial_compression_ratio") or vae["patch_size"] * 2**halvings
        return space, vae.get("temporal_compression_ratio") or vae["patch_size_t"] * 2**halvings
    if kind == "AutoencoderKLWan":
        return vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    space, time = vae.get("spatial_compression_ratio"), vae.get("temporal_compression_ratio")
    return (int(space), int(time)) if space and time else None
