"""Tiny transformers of Wan and of classes derived from it."""

from __future__ import annotations

import torch

from tests.families.tiny_parts import (
    CHANNELS,
    COLUMNS,
    INNER,
    ROWS,
    Built,
    Size,
    builder,
    wan_arguments,
    wan_config,
)


@builder("Wan")
def wan(size: Size) -> Built:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel, wan_config(size), wan_arguments(size)


@builder("Wan image-to-video")
def wan_image(size: Size) -> Built:
    from diffusers import WanTransformer3DModel

    config = wan_config(size, in_channels=2 * CHANNELS + 4, image_dim=8, added_kv_proj_dim=INNER)
    image = torch.randn(size.batch, 5, 8)
    latents = size.latents(2 * CHANNELS + 4)
    return WanTransformer3DModel, config, wan_arguments(size, hidden_states=latents, encoder_hidden_states_image=image)


@builder("Wan 2.2 text-and-image-to-video")
def wan_per_token(size: Size) -> Built:
    from diffusers import WanTransformer3DModel

    timestep = torch.full((size.batch, size.tokens), 500.0)
    timestep[:, : ROWS * COLUMNS] = 0  # the first frame is the given image
    return WanTransformer3DModel, wan_config(size), wan_arguments(size, timestep=timestep)


@builder("WanVACE")
def vace(size: Size) -> Built:
    from diffusers import WanVACETransformer3DModel

    config = wan_config(size, vace_layers=list(range(0, size.layers, 2)), vace_in_channels=8)
    control = size.latents(8)
    scale = torch.ones(len(config["vace_layers"]))
    arguments = wan_arguments(size, control_hidden_states=control, control_hidden_states_scale=scale)
    return WanVACETransformer3DModel, config, arguments


@builder("WanAnimate")
def animate(size: Size) -> Built:
    from diffusers import WanAnimateTransformer3DModel

    config = wan_config(
        size,
        in_channels=2 * CHANNELS + 4,
        latent_channels=CHANNELS,
        image_dim=None,
        motion_encoder_channel_sizes={"4": 8},
        motion_encoder_size=4,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    )
    arguments = wan_arguments(
        size,
        hidden_states=size.latents(2 * CHANNELS + 4),  # the first frame is the reference image
        pose_hidden_states=size.latents()[:, :, 1:],
        face_pixel_values=torch.rand(size.batch, 3, 4 * (size.frames - 1) - 3, 4, 4),
    )
    return WanAnimateTransformer3DModel, config, arguments


@builder("SkyReels-V2")
def skyreels(size: Size) -> Built:
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel, wan_config(size), wan_arguments(size)


@builder("SkyReels-V2 block-causal")
def skyreels_causal(size: Size) -> Built:
    """Build a model with diffusion forcing (one timestep per frame) and block-causal attention over frames."""
    from diffusers import SkyReelsV2Transformer3DModel

    block = next(step for step in range(2, size.frames + 1) if size.frames % step == 0)
    timestep = torch.linspace(200, 800, size.frames).expand(size.batch, -1)
    arguments = wan_arguments(size, timestep=timestep, enable_diffusion_forcing=True)
    return SkyReelsV2Transformer3DModel, wan_config(size, num_frame_per_block=block), arguments


@builder("ChronoEdit")
def chronoedit(size: Size) -> Built:
    from diffusers import ChronoEditTransformer3DModel

    return ChronoEditTransformer3DModel, wan_config(size), wan_arguments(size)


@builder("AnyFlow")
def anyflow(size: Size) -> Built:
    from diffusers import AnyFlowTransformer3DModel

    later = torch.full((size.batch, size.frames), 400.0)
    latents = size.latents().transpose(1, 2)
    arguments = wan_arguments(size, hidden_states=latents, timestep=later + 100, r_timestep=later)
    return AnyFlowTransformer3DModel, wan_config(size), arguments


@builder("Helios")
def helios(size: Size) -> Built:
    """Build a model with a long, a middle and a short history before the current frames."""
    from diffusers import HeliosTransformer3DModel

    config = wan_config(size, rope_dim=(4, 6, 6))
    del config["rope_max_seq_len"]
    arguments = wan_arguments(size)
    start = 0
    for name, frames in (("long", 4), ("mid", 2), ("short", 1)):
        arguments[f"latents_history_{name}"] = torch.randn(size.batch, CHANNELS, frames, ROWS * 2, COLUMNS * 2)
        arguments[f"indices_latents_history_{name}"] = torch.arange(start, start + frames).expand(size.batch, -1)
        start += frames
    arguments["indices_hidden_states"] = torch.arange(start, start + size.frames).expand(size.batch, -1)
    return HeliosTransformer3DModel, config, arguments
