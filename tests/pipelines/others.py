"""Tiny pipelines whose text encoder is T5, or that take embeddings and have none."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.families.tiny_models import BUILDERS
from tests.families.tiny_parts import TEXT_DIM, build
from tests.pipelines.parts import SIZE, Tiny, call, image, t5_parts, tiny, video, wan_parts

CHANNELS = 4


def transformer(name: str, **changes: Any) -> Any:
    """The tiny transformer of this name in the table of tiny models, with the latents' 4 channels."""
    kind, config, _ = BUILDERS[name](SIZE)
    return build(
        kind, {**config, **{key: CHANNELS for key in ("in_channels", "out_channels") if key in config}, **changes}
    )


@functools.cache
def cogvideox_vae() -> Any:
    from diffusers import AutoencoderKLCogVideoX

    kinds = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
    sizes = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "latent_channels": CHANNELS, "norm_num_groups": 2}
    return build(AutoencoderKLCogVideoX, {**kinds, **sizes, "temporal_compression_ratio": 4})


def cogvideox_parts(name: str = "CogVideoX 1.0", **changes: Any) -> dict[str, Any]:
    from diffusers import CogVideoXDDIMScheduler

    sizes = {"sample_width": 4, "sample_height": 2, "sample_frames": 9, "max_text_seq_length": 8}
    made = {"vae": cogvideox_vae(), "transformer": transformer(name, **sizes, **changes)}
    return {**t5_parts(), **made, "scheduler": CogVideoXDDIMScheduler()}


def cogvideox_call(**changes: Any) -> dict[str, Any]:
    return call(max_sequence_length=8, **changes)


@tiny("CogVideoXPipeline")
def cogvideox() -> Tiny:
    return cogvideox_parts(), cogvideox_call()


@tiny("CogVideoXImageToVideoPipeline")
def cogvideox_image() -> Tiny:
    return cogvideox_parts(in_channels=2 * CHANNELS), cogvideox_call(image=image())


@tiny("CogVideoXVideoToVideoPipeline")
def cogvideox_video() -> Tiny:
    return cogvideox_parts(), cogvideox_call(video=video(), num_frames=None, num_inference_steps=4)


@tiny("CogVideoXFunControlPipeline")
def cogvideox_control() -> Tiny:
    return cogvideox_parts(in_channels=2 * CHANNELS), cogvideox_call(control_video=video(), num_frames=None)


@tiny("ConsisIDPipeline")
def consisid() -> Tiny:
    face = {"id_cond": torch.randn(1, 8), "id_vit_hidden": [torch.randn(1, 3, 8) for _ in range(5)]}
    return cogvideox_parts("ConsisID", in_channels=2 * CHANNELS), cogvideox_call(image=image(), **face)


@functools.cache
def ltx_vae() -> Any:
    from diffusers import AutoencoderKLLTXVideo

    blocks = {"block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5}
    scaling = {"spatio_temporal_scaling": (True, True, False, False)}
    both = {**blocks, **scaling, **{f"decoder_{name}": value for name, value in (blocks | scaling).items()}}
    plain = {"decoder_inject_noise": (False,) * 5, "upsample_residual": (False,) * 4, "upsample_factor": (1,) * 4}
    return build(AutoencoderKLLTXVideo, {**both, **plain, "latent_channels": CHANNELS, "patch_size": 1})


def ltx_parts() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    made = {"vae": ltx_vae(), "transformer": transformer("LTX"), "scheduler": FlowMatchEulerDiscreteScheduler()}
    return {**t5_parts(), **made}


def ltx_call(**changes: Any) -> dict[str, Any]:
    return call(height=32, width=32, max_sequence_length=8, **changes)


@tiny("LTXPipeline")
def ltx() -> Tiny:
    return ltx_parts(), ltx_call()


@tiny("LTXImageToVideoPipeline")
def ltx_image() -> Tiny:
    return ltx_parts(), ltx_call(image=image(32, 32))


@tiny("LTXConditionPipeline")
def ltx_condition() -> Tiny:
    return ltx_parts(), ltx_call(image=image(32, 32))


@tiny("LTXI2VLongMultiPromptPipeline")
def ltx_long() -> Tiny:
    return ltx_parts(), ltx_call(cond_image=image(32, 32), num_frames=17)


@tiny("MochiPipeline")
def mochi() -> Tiny:
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler

    sizes = {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4, "latent_channels": 12}
    vae = build(AutoencoderKLMochi, {**sizes, "layers_per_block": (1,) * 5})
    made = {"vae": vae, "transformer": transformer("Mochi", in_channels=12)}
    return {**t5_parts(), **made, "scheduler": FlowMatchEulerDiscreteScheduler()}, call(max_sequence_length=5)


@tiny("AllegroPipeline")
def allegro() -> Tiny:
    from diffusers import AutoencoderKLAllegro, DDIMScheduler

    sizes = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "latent_channels": CHANNELS, "norm_num_groups": 2}
    made = {"vae": build(AutoencoderKLAllegro, sizes), "transformer": transformer("Allegro")}
    return {**t5_parts(), **made, "scheduler": DDIMScheduler()}, call(num_frames=12, clean_caption=False)


@tiny("LattePipeline")
def latte() -> Tiny:
    from diffusers import AutoencoderKL, DDIMScheduler

    made = {"transformer": transformer("Latte", sample_size=8, out_channels=2 * CHANNELS)}  # noise and variance
    made |= {"vae": build(AutoencoderKL, {"latent_channels": CHANNELS})}
    arguments = call(num_frames=None, video_length=SIZE.frames, height=8, width=8, clean_caption=False)
    return {**t5_parts(), **made, "scheduler": DDIMScheduler()}, arguments


class LetsEverythingThrough(torch.nn.Module):
    """In the place of Cosmos' guardrail, an optional package of gigabytes."""

    dtype = torch.float32
    device = torch.device("cpu")

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, clip: Any) -> Any:
        return clip


def cosmos_parts(**changes: Any) -> dict[str, Any]:
    made = {"transformer": transformer("Cosmos", **changes), "safety_checker": LetsEverythingThrough()}
    return {**t5_parts(), **made}


@functools.cache
def cosmos_vae() -> Any:
    from diffusers import AutoencoderKLCosmos

    sizes = {"encoder_block_out_channels": (8, 8, 8, 8), "decode_block_out_channels": (8, 8, 8, 8), "num_layers": 1}
    return build(AutoencoderKLCosmos, {**sizes, "latent_channels": CHANNELS, "attention_resolutions": ()})


def edm() -> Any:
    from diffusers import EDMEulerScheduler

    return EDMEulerScheduler(sigma_min=0.002, sigma_max=80, final_sigmas_type="sigma_min")


@tiny("CosmosTextToWorldPipeline")
def cosmos_text() -> Tiny:
    return {**cosmos_parts(), "vae": cosmos_vae(), "scheduler": edm()}, call(num_frames=17)


@tiny("CosmosVideoToWorldPipeline")
def cosmos_video() -> Tiny:
    made = {**cosmos_parts(in_channels=CHANNELS + 1), "vae": cosmos_vae(), "scheduler": edm()}
    return made, call(image=image(), num_frames=17)


@tiny("Cosmos2VideoToWorldPipeline")
def cosmos2_video() -> Tiny:
    from diffusers import FlowMatchEulerDiscreteScheduler

    made = {**cosmos_parts(in_channels=CHANNELS + 1), "vae": wan_parts()["vae"]}
    return {**made, "scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)}, call(image=image())


def embeddings(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random prompt embeddings by argument name, for the prompt and the negative prompt."""
    made = {}
    for sign in ("", "negative_"):
        for name, shape in shapes.items():
            made[f"{sign}{name}"] = torch.ones(shape) if "mask" in name else torch.randn(shape)
    return made


@tiny("Cosmos2_5_PredictBasePipeline")
def cosmos25() -> Tiny:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    made = {**cosmos_parts(in_channels=CHANNELS + 1), "vae": wan_parts()["vae"], "scheduler": scheduler}
    arguments = call(prompt=None, **embeddings(prompt_embeds=(1, 6, TEXT_DIM)))
    return {**made, "text_encoder": None, "tokenizer": None}, arguments
