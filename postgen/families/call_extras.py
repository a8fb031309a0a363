"""What transformers are told besides latents, timestep and text, at a given size: random normal, no token is padding.

One function for each way of being called, `(config, size) -> arguments by name`; layout rows name them in `Call`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.families.video_tokens import LatentAxes

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
            "BCHW": (channels, self.height, self.width),
            "packed": (frames * self.height * self.width, channels),
        }
        return self.noise(*shapes[axes])


Extras = Callable[[Any, Size], dict[str, Any]]


def nothing(config: Any, size: Size) -> dict[str, Any]:
    """Nothing more: Latte."""
    return {}


def image_of_wan(config: Any, size: Size) -> dict[str, Any]:
    """The first frame as CLIP sees it: 16 x 16 patches and a class token."""
    return {} if config["image_dim"] is None else {"encoder_hidden_states_image": size.text(config["image_dim"], 257)}


def vace(config: Any, size: Size) -> dict[str, Any]:
    """The control, and how much it counts in each of its blocks."""
    control = size.latents(config["vace_in_channels"], "BCTHW")
    scale = torch.ones(len(config["vace_layers"]), device=size.device, dtype=size.dtype)
    return {**image_of_wan(config, size), "control_hidden_states": control, "control_hidden_states_scale": scale}


def animate(config: Any, size: Size) -> dict[str, Any]:
    """The first latent frame is the reference image; a face for every frame of the others."""
    side, frames = config["motion_encoder_size"], size.frames - 1
    faces = size.noise(3, 4 * frames - 3, side, side)
    pose = size.latents(config["latent_channels"], "BCTHW", frames)
    return {**image_of_wan(config, size), "pose_hidden_states": pose, "face_pixel_values": faces}


def skyreels(config: Any, size: Size) -> dict[str, Any]:
    """A timestep per frame and causal blocks where the model has them, and the frame rate where it is told."""
    extras = image_of_wan(config, size)
    if config["num_frame_per_block"] > 1:
        extras |= {"enable_diffusion_forcing": True, "timestep": size.full(500.0, size.frames)}
    if config["inject_sample_info"]:
        extras["fps"] = size.mask(1)[:, 0].tolist()
    return extras


def anyflow(config: Any, size: Size) -> dict[str, Any]:
    """A timestep per frame, and the one that it goes to."""
    timestep = size.full(500.0, size.frames)
    return {"timestep": timestep, "r_timestep": timestep - 100}


def helios(config: Any, size: Size) -> dict[str, Any]:
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


def cogvideox(config: Any, size: Size) -> dict[str, Any]:
    """Angles, and a given offset of the last image, where the model takes them."""
    extras: dict[str, Any] = {}
    if config["use_rotary_positional_embeddings"]:
        patch, patch_t = config["patch_size"], config.get("patch_size_t") or 1
        tokens = -(-size.frames // patch_t) * (size.height // patch) * (size.width // patch)
        extras["image_rotary_emb"] = _rotary(tokens, config, size)
    if config.get("ofs_embed_dim"):
        extras["ofs"] = torch.full((1,), 2.0, device=size.device, dtype=size.dtype)
    return extras


def consisid(config: Any, size: Size) -> dict[str, Any]:
    """The face as seen by its recogniser and by five layers of CLIP: 24 x 24 patches and a class token."""
    extras = cogvideox(config, size)
    if config["is_train_face"]:
        extras["id_cond"] = size.noise(config["LFE_id_dim"])
        extras["id_vit_hidden"] = [size.text(config["LFE_vit_dim"], 577) for _ in range(config["LFE_num_scale"])]
    return extras


def hunyuan(config: Any, size: Size) -> dict[str, Any]:
    """A mask and a pooled text, and the guidance where it is distilled."""
    extras = {
        "encoder_attention_mask": size.mask(),
        "pooled_projections": size.noise(config["pooled_projection_dim"]),
    }
    return extras | ({"guidance": size.full(6000.0)} if config["guidance_embeds"] else {})


def framepack(config: Any, size: Size) -> dict[str, Any]:
    """16, 2 and 2 latent frames of history, and the given image as SigLIP sees it: 27 x 27 patches."""
    extras = {**hunyuan(config, size), "image_embeds": size.text(config["image_proj_dim"], 729)}
    start = 0
    for name, frames in (("history_4x", 16), ("history_2x", 2), ("clean", 2)):
        extras[f"latents_{name}"] = size.latents(config["in_channels"], "BCTHW", frames)
        extras[f"indices_latents_{name}"] = size.indices(start, frames)
        start += frames
    return {**extras, "indices_latents": size.indices(start, size.frames)}


def hunyuan_15(config: Any, size: Size) -> dict[str, Any]:
    """With 256 tokens of glyphs; an image of zeros says that there is none."""
    image = torch.zeros(size.batch, 729, config["image_embed_dim"], device=size.device, dtype=size.dtype)
    return {
        "encoder_attention_mask": size.mask(),
        "encoder_hidden_states_2": size.text(config["text_embed_2_dim"], 256),
        "encoder_attention_mask_2": size.mask(256),
        "image_embeds": image,
    }


def packed(config: Any, size: Size) -> dict[str, Any]:
    """The grid of packed tokens, and a mask of the text."""
    sizes = {"num_frames": size.frames, "height": size.height, "width": size.width}
    return {"encoder_attention_mask": size.mask(), **sizes}


def ltx(config: Any, size: Size) -> dict[str, Any]:
    """Also in which unit the positions are told."""
    return {**packed(config, size), "rope_interpolation_scale": (8 / FRAME_RATE, 32, 32)}


def ltx2(config: Any, size: Size) -> dict[str, Any]:
    """With the sound of a clip of this length."""
    rate = config["audio_sampling_rate"] / config["audio_hop_length"] / config["audio_scale_factor"]
    sound = max(1, round(size.num_frames / FRAME_RATE * rate))
    return {
        **packed(config, size),
        "audio_hidden_states": size.noise(sound, config["audio_in_channels"]),
        "audio_encoder_hidden_states": size.text(config["caption_channels"]),
        "audio_encoder_attention_mask": size.mask(),
        "audio_num_frames": sound,
    }


def mask_of_text(config: Any, size: Size) -> dict[str, Any]:
    """A mask of the text."""
    return {"encoder_attention_mask": size.mask()}


def mochi(config: Any, size: Size) -> dict[str, Any]:
    """A mask of the text, in bools."""
    return {"encoder_attention_mask": size.mask(dtype=torch.bool)}


def allegro(config: Any, size: Size) -> dict[str, Any]:
    """A mask of the text, and angles with their places."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    patch = config["patch_size"]
    frames, rows, columns = size.frames // config["patch_size_t"], size.height // patch, size.width // patch
    frequencies = get_3d_rotary_pos_embed_allegro(
        config["attention_head_dim"], ((0, 0), (rows, columns)), (rows, columns), frames, device=size.device
    )
    axes = [torch.arange(count, device=size.device) for count in (frames, rows, columns)]
    places = tuple(torch.cartesian_prod(*axes).T[:, None])
    return {"encoder_attention_mask": size.mask(), "image_rotary_emb": (frequencies[:3], places)}


def easyanimate(config: Any, size: Size) -> dict[str, Any]:
    """A second text where the model takes one."""
    width = config["text_embed_dim_t5"]
    return {} if width is None else {"encoder_hidden_states_t5": size.text(width)}


def cosmos(config: Any, size: Size) -> dict[str, Any]:
    """The frame rate, and a mask of padded pixels where the model takes one."""
    extras: dict[str, Any] = {"fps": FRAME_RATE}
    if config["concat_padding_mask"]:
        from diffusers.utils.import_utils import is_torchvision_available

        if not is_torchvision_available():
            raise UserError("Cosmos resizes its padding mask with torchvision: pip install torchvision")
        mask = torch.zeros(1, 1, size.height * 8, size.width * 8, device=size.device, dtype=size.dtype)
        extras["padding_mask"] = mask
    return extras


def kandinsky5(config: Any, size: Size) -> dict[str, Any]:
    """A pooled text, and the places of tokens of video and text."""
    _, rows, columns = config["patch_size"]
    grid = (size.frames // config["patch_size"][0], size.height // rows, size.width // columns)
    return {
        "pooled_projections": size.noise(config["in_text_dim2"]),
        "visual_rope_pos": [size.indices(0, count) for count in grid],
        "text_rope_pos": size.indices(0, size.text_tokens),
    }


def kandinsky6(config: Any, size: Size) -> dict[str, Any]:
    """With the sound of a clip of this length: 44,100 samples a second, 1,024 in a latent."""
    sound = -(-size.num_frames * 44_100 // (FRAME_RATE * 1024))
    return {
        "pooled_projections": size.noise(config["in_text_dim2"]),
        "audio_hidden_states": size.noise(sound, config["in_audio_dim"]),
    }


def dit(config: Any, size: Size) -> dict[str, Any]:
    """A class instead of a text."""
    return {"class_labels": size.mask(1)[:, 0]}


def pixart(config: Any, size: Size) -> dict[str, Any]:
    """A mask of the text, and the size of the picture where the model is told it."""
    told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if config["use_additional_conditions"] or (
        config["use_additional_conditions"] is None and config["sample_size"] == 128
    ):
        side = size.full(1024.0, 2).to(size.dtype)
        told = {"resolution": side, "aspect_ratio": side[:, :1] / side[:, 1:]}
    return {**mask_of_text(config, size), "added_cond_kwargs": told}


def pooled(config: Any, size: Size) -> dict[str, Any]:
    """A pooled text: Stable Diffusion 3."""
    return {"pooled_projections": size.noise(config["pooled_projection_dim"])}


def _places(size: Size) -> dict[str, Any]:
    axes = [size.indices(0, count) for count in (1, size.height, size.width)]
    text = torch.zeros(size.text_tokens, 3, device=size.device, dtype=size.dtype)
    return {"img_ids": torch.cartesian_prod(*axes).to(size.dtype), "txt_ids": text}


def chroma(config: Any, size: Size) -> dict[str, Any]:
    """Where the tokens of picture and text are, and a mask of both."""
    return {**_places(size), "attention_mask": size.mask(size.text_tokens + size.height * size.width, torch.bool)}


def flux(config: Any, size: Size) -> dict[str, Any]:
    """Where the tokens of picture and text are, a pooled text, and the guidance where it is distilled."""
    extras = {**_places(size), **pooled(config, size)}
    return extras | ({"guidance": size.full(3.5)} if config["guidance_embeds"] else {})


def motif(config: Any, size: Size) -> dict[str, Any]:
    """The given image as SigLIP sees it, 256 patches, where the model takes one."""
    width = config["image_embed_dim"]
    return mask_of_text(config, size) | ({} if width is None else {"image_embeds": size.text(width, 256)})
