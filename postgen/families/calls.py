"""Calls of the registered transformers at a given size: what a pipeline would pass, filled with noise.

For counting and timing, where only shapes matter. Values are random normal; masks say that every token counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families.registry import layout_named, video_tokens_named
from postgen.families.video_tokens import Grid, LatentAxes

FRAME_RATE = 24
"""Frames per second that the length of a sound track is told from."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of one call. `make` makes its tensors."""

    batch: int
    num_frames: int
    """Frames of the clip."""
    frames: int
    """Latent frames."""
    height: int
    """Of a latent frame."""
    width: int
    text_tokens: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def noise(self, *shape: int) -> Tensor:
        """(batch, *shape), always the same; the random state of the program is left alone."""
        source = torch.Generator(self.device).manual_seed(0)
        return torch.randn(self.batch, *shape, generator=source, device=self.device, dtype=self.dtype)

    def text(self, width: int, tokens: int | None = None) -> Tensor:
        """(batch, tokens, width)"""
        return self.noise(tokens or self.text_tokens, width)

    def mask(self, tokens: int | None = None, dtype: torch.dtype = torch.int64) -> Tensor:
        """(batch, tokens): no token is padding."""
        return torch.ones(self.batch, tokens or self.text_tokens, device=self.device, dtype=dtype)

    def full(self, value: float, *shape: int) -> Tensor:
        """(batch, *shape) of one value."""
        return torch.full((self.batch, *shape), value, device=self.device)

    def indices(self, start: int, count: int) -> Tensor:
        """(count,) consecutive positions."""
        return torch.arange(start, start + count, device=self.device)

    def latents(self, channels: int, axes: LatentAxes, frames: int | None = None) -> Tensor:
        """Latents in the axes of a layout row."""
        frames = frames or self.frames
        shapes = {
            "BCTHW": (channels, frames, self.height, self.width),
            "BTCHW": (frames, channels, self.height, self.width),
            "BTHWC": (frames, self.height, self.width, channels),
            "packed": (frames * self.height * self.width, channels),
        }
        return self.noise(*shapes[axes])


Extras = Callable[[Any, Size], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Call:
    """How a transformer class is called."""

    extras: Extras
    """Arguments besides the latents, the timestep and the text."""
    text_tokens: int = 512
    """Tokens of a prompt that the pipeline pads to by default."""
    text_width: str = "text_dim"
    """Field of the config that tells the width of the text."""
    time: int = 4
    """Frames that its autoencoder puts into a latent frame."""
    space: int = 8
    """Pixels a side that its autoencoder puts into a latent pixel."""
    more_frames: int = 0
    """Latent frames of references that stand beside those of the clip."""


def call_arguments(kind: str, config: Any, size: Size) -> dict[str, Any]:
    """Return keyword arguments of one forward.

    Args:
        kind: a registered transformer class.
        config: its config.
        size: how large, where and in which dtype.

    Raises:
        UserError: an unknown class, or a config that needs an optional package which is not there.
    """
    call = call_of(kind)
    arguments = {
        "hidden_states": size.latents(_channels(config), video_tokens_named(kind).latent_axes),
        "timestep": size.full(500.0),
        "encoder_hidden_states": size.text(config[call.text_width]),
    }
    return {**arguments, **call.extras(config, size)}


def call_of(kind: str) -> Call:
    """Return how a class is called.

    Raises:
        UserError: unknown.
    """
    video_tokens_named(kind)
    if kind not in CALLS:
        raise UserError(
            f"it is not known how {kind} is called. Known: {', '.join(sorted(CALLS))}. For another class give the "
            "arguments of its forward to postgen.families.cost.call_cost"
        )
    return CALLS[kind]


def compression(kind: str, config: Any) -> tuple[int, int]:
    """Return how many frames and how many pixels a side make a latent, by the autoencoder the class is used with."""
    call = call_of(kind)
    # The autoencoder of Wan 2.2 5B has 48 channels and shrinks by 16.
    wide = kind == "WanTransformer3DModel" and config["out_channels"] == 48
    # Cosmos 2 took the autoencoder of Wan, and lost the learned positions with it.
    slow = kind == "CosmosTransformer3DModel" and config["extra_pos_embed_type"] == "learnable"
    return 8 if slow else call.time, 16 if wide else call.space


# All that counting, timing and replacing layers read of the layout rows.


def registered_name(kind: type) -> str:
    """Return the class name under which a transformer class, or the first of its parents, is registered.

    Raises:
        UserError: none is.
    """
    return layout_named(*(parent.__name__ for parent in kind.__mro__)).transformer


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the repeated blocks."""
    return tuple(layout_named(registered_name(type(model))).block_modules(model))


def self_attention_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that attend among the video tokens."""
    return tuple(video_tokens_named(registered_name(type(model))).attention_modules(model))


def grid_of_call(model: nn.Module, arguments: Mapping[str, Any]) -> Grid | None:
    """Return the token grid of a call; None where it does not tell."""
    return video_tokens_named(registered_name(type(model))).grid(model, **arguments)


def _channels(config: Any) -> int:
    if "in_visual_dim" not in config:
        return int(config["in_channels"])
    # Kandinsky: noise, condition, and whether there is one.
    return 2 * config["in_visual_dim"] + 1 if config["visual_cond"] else int(config["in_visual_dim"])


def _nothing(config: Any, size: Size) -> dict[str, Any]:
    return {}


def _image_of_wan(config: Any, size: Size) -> dict[str, Any]:
    """The first frame as CLIP sees it: 16 x 16 patches and a class token."""
    return {} if config["image_dim"] is None else {"encoder_hidden_states_image": size.text(config["image_dim"], 257)}


def _vace(config: Any, size: Size) -> dict[str, Any]:
    control = size.latents(config["vace_in_channels"], "BCTHW")
    scale = torch.ones(len(config["vace_layers"]), device=size.device, dtype=size.dtype)
    return {**_image_of_wan(config, size), "control_hidden_states": control, "control_hidden_states_scale": scale}


def _animate(config: Any, size: Size) -> dict[str, Any]:
    """The first latent frame is the reference image; a face for every frame of the others."""
    side, frames = config["motion_encoder_size"], size.frames - 1
    faces = size.noise(3, 4 * frames - 3, side, side)
    pose = size.latents(config["latent_channels"], "BCTHW", frames)
    return {**_image_of_wan(config, size), "pose_hidden_states": pose, "face_pixel_values": faces}


def _skyreels(config: Any, size: Size) -> dict[str, Any]:
    extras = _image_of_wan(config, size)
    if config["num_frame_per_block"] > 1:
        extras |= {"enable_diffusion_forcing": True, "timestep": size.full(500.0, size.frames)}
    if config["inject_sample_info"]:
        extras["fps"] = size.mask(1)[:, 0].tolist()
    return extras


def _anyflow(config: Any, size: Size) -> dict[str, Any]:
    timestep = size.full(500.0, size.frames)
    return {"timestep": timestep, "r_timestep": timestep - 100}


def _helios(config: Any, size: Size) -> dict[str, Any]:
    """16, 2 and 1 latent frames of history, as the pipeline keeps by default."""
    extras: dict[str, Any] = {}
    start = 0
    for name, frames in (("long", 16), ("mid", 2), ("short", 1)):
        extras[f"latents_history_{name}"] = size.latents(config["in_channels"], "BCTHW", frames)
        extras[f"indices_latents_history_{name}"] = size.indices(start, frames).expand(size.batch, -1)
        start += frames
    extras["indices_hidden_states"] = size.indices(start, size.frames).expand(size.batch, -1)
    return extras


def _rotary(tokens: int, config: Any, size: Size) -> tuple[Tensor, Tensor]:
    angles = torch.zeros(tokens, config["attention_head_dim"], device=size.device)
    return angles.cos(), angles.sin()


def _cogvideox(config: Any, size: Size) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if config["use_rotary_positional_embeddings"]:
        patch, patch_t = config["patch_size"], config.get("patch_size_t") or 1
        tokens = -(-size.frames // patch_t) * (size.height // patch) * (size.width // patch)
        extras["image_rotary_emb"] = _rotary(tokens, config, size)
    if config.get("ofs_embed_dim"):
        extras["ofs"] = torch.full((1,), 2.0, device=size.device, dtype=size.dtype)
    return extras


def _consisid(config: Any, size: Size) -> dict[str, Any]:
    """The face as seen by its recogniser and by five layers of CLIP: 24 x 24 patches and a class token."""
    extras = _cogvideox(config, size)
    if config["is_train_face"]:
        extras["id_cond"] = size.noise(config["LFE_id_dim"])
        extras["id_vit_hidden"] = [size.text(config["LFE_vit_dim"], 577) for _ in range(config["LFE_num_scale"])]
    return extras


def _hunyuan(config: Any, size: Size) -> dict[str, Any]:
    extras = {
        "encoder_attention_mask": size.mask(),
        "pooled_projections": size.noise(config["pooled_projection_dim"]),
    }
    return extras | ({"guidance": size.full(6000.0)} if config["guidance_embeds"] else {})


def _framepack(config: Any, size: Size) -> dict[str, Any]:
    """16, 2 and 2 latent frames of history, and the given image as SigLIP sees it: 27 x 27 patches."""
    extras = {**_hunyuan(config, size), "image_embeds": size.text(config["image_proj_dim"], 729)}
    start = 0
    for name, frames in (("history_4x", 16), ("history_2x", 2), ("clean", 2)):
        extras[f"latents_{name}"] = size.latents(config["in_channels"], "BCTHW", frames)
        extras[f"indices_latents_{name}"] = size.indices(start, frames)
        start += frames
    return {**extras, "indices_latents": size.indices(start, size.frames)}


def _hunyuan_15(config: Any, size: Size) -> dict[str, Any]:
    """With 256 tokens of glyphs; an image of zeros says that there is none."""
    image = torch.zeros(size.batch, 729, config["image_embed_dim"], device=size.device, dtype=size.dtype)
    return {
        "encoder_attention_mask": size.mask(),
        "encoder_hidden_states_2": size.text(config["text_embed_2_dim"], 256),
        "encoder_attention_mask_2": size.mask(256),
        "image_embeds": image,
    }


def _packed(config: Any, size: Size) -> dict[str, Any]:
    sizes = {"num_frames": size.frames, "height": size.height, "width": size.width}
    return {"encoder_attention_mask": size.mask(), **sizes}


def _ltx(config: Any, size: Size) -> dict[str, Any]:
    return {**_packed(config, size), "rope_interpolation_scale": (8 / FRAME_RATE, 32, 32)}


def _ltx2(config: Any, size: Size) -> dict[str, Any]:
    """With the sound of a clip of this length."""
    rate = config["audio_sampling_rate"] / config["audio_hop_length"] / config["audio_scale_factor"]
    sound = max(1, round(size.num_frames / FRAME_RATE * rate))
    return {
        **_packed(config, size),
        "audio_hidden_states": size.noise(sound, config["audio_in_channels"]),
        "audio_encoder_hidden_states": size.text(config["caption_channels"]),
        "audio_encoder_attention_mask": size.mask(),
        "audio_num_frames": sound,
    }


def _mask_of_text(config: Any, size: Size) -> dict[str, Any]:
    return {"encoder_attention_mask": size.mask()}


def _mochi(config: Any, size: Size) -> dict[str, Any]:
    return {"encoder_attention_mask": size.mask(dtype=torch.bool)}


def _allegro(config: Any, size: Size) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    patch = config["patch_size"]
    frames, rows, columns = size.frames // config["patch_size_t"], size.height // patch, size.width // patch
    frequencies = get_3d_rotary_pos_embed_allegro(
        config["attention_head_dim"], ((0, 0), (rows, columns)), (rows, columns), frames, device=size.device
    )
    axes = [torch.arange(count, device=size.device) for count in (frames, rows, columns)]
    places = tuple(torch.cartesian_prod(*axes).T[:, None])
    return {"encoder_attention_mask": size.mask(), "image_rotary_emb": (frequencies[:3], places)}


def _easyanimate(config: Any, size: Size) -> dict[str, Any]:
    width = config["text_embed_dim_t5"]
    return {} if width is None else {"encoder_hidden_states_t5": size.text(width)}


def _cosmos(config: Any, size: Size) -> dict[str, Any]:
    extras: dict[str, Any] = {"fps": FRAME_RATE}
    if config["concat_padding_mask"]:
        from diffusers.utils.import_utils import is_torchvision_available

        if not is_torchvision_available():
            raise UserError("Cosmos resizes its padding mask with torchvision: pip install torchvision")
        mask = torch.zeros(1, 1, size.height * 8, size.width * 8, device=size.device, dtype=size.dtype)
        extras["padding_mask"] = mask
    return extras


def _kandinsky5(config: Any, size: Size) -> dict[str, Any]:
    _, rows, columns = config["patch_size"]
    grid = (size.frames // config["patch_size"][0], size.height // rows, size.width // columns)
    return {
        "pooled_projections": size.noise(config["in_text_dim2"]),
        "visual_rope_pos": [size.indices(0, count) for count in grid],
        "text_rope_pos": size.indices(0, size.text_tokens),
    }


def _kandinsky6(config: Any, size: Size) -> dict[str, Any]:
    """With the sound of a clip of this length: 44,100 samples a second, 1,024 in a latent."""
    sound = -(-size.num_frames * 44_100 // (FRAME_RATE * 1024))
    return {
        "pooled_projections": size.noise(config["in_text_dim2"]),
        "audio_hidden_states": size.noise(sound, config["in_audio_dim"]),
    }


def _motif(config: Any, size: Size) -> dict[str, Any]:
    """The given image as SigLIP sees it, 256 patches, where the model takes one."""
    width = config["image_embed_dim"]
    return _mask_of_text(config, size) | ({} if width is None else {"image_embeds": size.text(width, 256)})


CALLS = {
    "AllegroTransformer3DModel": Call(extras=_allegro, text_width="caption_channels"),
    "AnyFlowTransformer3DModel": Call(extras=_anyflow),
    "ChronoEditTransformer3DModel": Call(extras=_image_of_wan),
    "CogVideoXTransformer3DModel": Call(extras=_cogvideox, text_tokens=226, text_width="text_embed_dim"),
    "ConsisIDTransformer3DModel": Call(extras=_consisid, text_tokens=226, text_width="text_embed_dim"),
    "CosmosTransformer3DModel": Call(extras=_cosmos, text_width="text_embed_dim"),
    "EasyAnimateTransformer3DModel": Call(extras=_easyanimate, text_tokens=256, text_width="text_embed_dim"),
    "HeliosTransformer3DModel": Call(extras=_helios),
    "HunyuanVideo15Transformer3DModel": Call(
        extras=_hunyuan_15, text_tokens=1000, text_width="text_embed_dim", space=16
    ),
    "HunyuanVideoFramepackTransformer3DModel": Call(extras=_framepack, text_tokens=256, text_width="text_embed_dim"),
    "HunyuanVideoTransformer3DModel": Call(extras=_hunyuan, text_tokens=256, text_width="text_embed_dim"),
    "Kandinsky5Transformer3DModel": Call(extras=_kandinsky5, text_width="in_text_dim"),
    "Kandinsky6Transformer3DModel": Call(extras=_kandinsky6, text_tokens=1024, text_width="in_text_dim"),
    "LTX2VideoTransformer3DModel": Call(
        extras=_ltx2, text_tokens=1024, text_width="caption_channels", time=8, space=32
    ),
    "LTXVideoTransformer3DModel": Call(extras=_ltx, text_tokens=128, text_width="caption_channels", time=8, space=32),
    "LatteTransformer3DModel": Call(extras=_nothing, text_tokens=120, text_width="caption_channels", time=1),
    "MochiTransformer3DModel": Call(extras=_mochi, text_tokens=256, text_width="text_embed_dim", time=6),
    "MotifVideoTransformer3DModel": Call(extras=_motif, text_width="text_embed_dim"),
    "SkyReelsV2Transformer3DModel": Call(extras=_skyreels),
    "WanAnimateTransformer3DModel": Call(extras=_animate, more_frames=1),
    "WanTransformer3DModel": Call(extras=_image_of_wan),
    "WanVACETransformer3DModel": Call(extras=_vace),
}
