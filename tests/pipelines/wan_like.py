"""Tiny pipelines of Wan and its relatives."""

from __future__ import annotations

from typing import Any

from tests.families.tiny_parts import build, wan_config
from tests.pipelines.parts import SIZE, Tiny, call, clip_vision, image, tiny, video, wan_parts

CHANNELS = 4
"""Of the autoencoder's latents."""
CONDITIONED = 2 * CHANNELS + 4
"""Noise, the latents of the given frames, and which frames are given."""


def parts(kind: str, scheduler: Any = None, **config: Any) -> dict[str, Any]:
    """Wan's parts around a transformer of the class `kind`."""
    import diffusers

    config = wan_config(SIZE, **{"in_channels": CHANNELS, "out_channels": CHANNELS, **config})
    config = {key: value for key, value in config.items() if value is not None}
    made = {**wan_parts(), "transformer": build(getattr(diffusers, kind), config)}
    return {**made, "scheduler": scheduler} if scheduler is not None else made


def unipc() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


@tiny("WanPipeline")
def wan() -> Tiny:
    return parts("WanTransformer3DModel"), call()


@tiny("WanImageToVideoPipeline")
def wan_image() -> Tiny:
    return parts("WanTransformer3DModel", in_channels=CONDITIONED), call(image=image())


@tiny("WanVideoToVideoPipeline")
def wan_video() -> Tiny:
    return parts("WanTransformer3DModel"), call(video=video(), num_frames=None, num_inference_steps=4)


@tiny("WanVACEPipeline")
def wan_vace() -> Tiny:
    control = 2 * CHANNELS + 8 * 8  # dark and bright part, mask in pixels
    return parts("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=control), call(video=video())


@tiny("WanAnimatePipeline")
def wan_animate() -> Tiny:
    config = {
        "in_channels": CONDITIONED,
        "latent_channels": CHANNELS,
        "image_dim": 8,
        "motion_encoder_channel_sizes": {"8": 8, "4": 8},
        "motion_encoder_size": 8,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 8,
        "face_encoder_hidden_dim": 8,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 1,
    }
    clips = {"pose_video": video(), "face_video": video(9, 8, 8), "segment_frame_length": 9}
    made = parts("WanAnimateTransformer3DModel", unipc(), **config)
    return {**made, **clip_vision()}, call(image=image(), num_frames=None, **clips)


@tiny("LucyEditPipeline")
def lucy() -> Tiny:
    return parts("WanTransformer3DModel", in_channels=2 * CHANNELS), call(video=video())


@tiny("SkyReelsV2Pipeline")
def skyreels() -> Tiny:
    return parts("SkyReelsV2Transformer3DModel", unipc()), call()


@tiny("SkyReelsV2ImageToVideoPipeline")
def skyreels_image() -> Tiny:
    made = parts("SkyReelsV2Transformer3DModel", unipc(), in_channels=CONDITIONED, image_dim=8, added_kv_proj_dim=32)
    return {**made, **clip_vision()}, call(image=image())


@tiny("SkyReelsV2DiffusionForcingPipeline")
def skyreels_forcing() -> Tiny:
    return parts("SkyReelsV2Transformer3DModel", unipc()), call(base_num_frames=9)


@tiny("SkyReelsV2DiffusionForcingImageToVideoPipeline")
def skyreels_forcing_image() -> Tiny:
    return parts("SkyReelsV2Transformer3DModel", unipc()), call(image=image(), base_num_frames=9)


@tiny("SkyReelsV2DiffusionForcingVideoToVideoPipeline")
def skyreels_forcing_video() -> Tiny:
    arguments = call(video=video(), base_num_frames=13, num_frames=17, overlap_history=5)
    return parts("SkyReelsV2Transformer3DModel", unipc()), arguments


@tiny("ChronoEditPipeline")
def chronoedit() -> Tiny:
    made = parts("ChronoEditTransformer3DModel", in_channels=CONDITIONED, image_dim=8, added_kv_proj_dim=32)
    return {**made, **clip_vision()}, call(image=image())


@tiny("AnyFlowPipeline")
def anyflow() -> Tiny:
    from diffusers import FlowMapEulerDiscreteScheduler

    return parts("AnyFlowTransformer3DModel", FlowMapEulerDiscreteScheduler()), call()


def helios_parts(scheduler: Any) -> dict[str, Any]:
    return parts("HeliosTransformer3DModel", scheduler, rope_dim=(4, 6, 6), rope_max_seq_len=None)


@tiny("HeliosPipeline")
def helios() -> Tiny:
    from diffusers import HeliosScheduler

    arguments = call(num_latent_frames_per_chunk=3, history_sizes=[4, 2, 1])
    return helios_parts(HeliosScheduler(stages=1, stage_range=[0, 1], gamma=0.3)), arguments


@tiny("HeliosPyramidPipeline")
def helios_pyramid() -> Tiny:
    from diffusers import HeliosScheduler

    steps = {"num_inference_steps": None, "pyramid_num_inference_steps_list": [1, 1, 1]}
    arguments = call(height=64, width=64, num_latent_frames_per_chunk=3, history_sizes=[4, 2, 1], **steps)
    # The covariance of the default gamma, 1/3, is singular: whether its Cholesky factor exists is up to the processor.
    return helios_parts(HeliosScheduler(gamma=0.3)), arguments
