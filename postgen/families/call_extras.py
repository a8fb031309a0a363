"""The forward arguments of transformers besides latents, timestep and text, for a call of a given size.

Values are random normal, and masks mark no token as padding. There is one function `(config, size) -> arguments by
name` for each set of arguments. Layout rows name these functions in `Call`.
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
"""Frames per second, for the length of the sound track of a clip."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size, device and dtype of a call; the methods make the tensors of the call."""

    batch: int
    num_frames: int
    """Frames of the clip, in pixel space."""
    frames: int
    """Latent frames."""
    height: int
    """Height of a latent frame, in latent pixels."""
    width: int
    """Width of a latent frame, in latent pixels."""
    text_tokens: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def noise(self, *shape: int) -> Tensor:
        """Return normal noise (batch, *shape): always the same values. The global random state does not change."""
        source = torch.Generator(self.device).manual_seed(0)
        return torch.randn(self.batch, *shape, generator=source, device=self.device, dtype=self.dtype)

    def text(self, width: int, tokens: int | None = None) -> Tensor:
        """Return a text encoding (batch, tokens, width) of normal noise."""
        return self.noise(tokens or self.text_tokens, width)

    def mask(self, tokens: int | None = None, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return a mask (batch, tokens) of ones: no token is padding."""
        return torch.ones(self.batch, tokens or self.text_tokens, device=self.device, dtype=dtype)

    def full(self, value: float, *shape: int) -> Tensor:
        """Return a float32 tensor (batch, *shape) that is filled with one value."""
        return torch.full((self.batch, *shape), value, device=self.device)

    def indices(self, start: int, count: int) -> Tensor:
        """Return (count,) consecutive positions."""
        return torch.arange(start, start + count, device=self.device)

    def latents(self, channels: int, axes: LatentAxes, frames: int | None = None) -> Tensor:
        """Return latents of normal noise, with the axes of a layout row."""
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
    """Return an empty dictionary: Latte takes no further arguments."""
    return {}


def image_of_wan(config: Any, size: Size) -> dict[str, Any]:
    """Return the CLIP encoding of the first frame (16 x 16 patches and a class token) if the model takes one."""
    return {} if config["image_dim"] is None else {"encoder_hidden_states_image": size.text(config["image_dim"], 257)}


def vace(config: Any, size: Size) -> dict[str, Any]:
    """Return the control latents, and their scale in each VACE block."""
    control = size.latents(config["vace_in_channels"], "BCTHW")
    scale = torch.ones(len(config["vace_layers"]), device=size.device, dtype=size.dtype)
    return {**image_of_wan(config, size), "control_hidden_states": control, "control_hidden_states_scale": scale}


def animate(config: Any, size: Size) -> dict[str, Any]:
    """Return pose latents and face pictures. The first latent frame is the reference image and has no pose or face."""
    side, frames = config["motion_encoder_size"], size.frames - 1
    faces = size.noise(3, 4 * frames - 3, side, side)
    pose = size.latents(config["latent_channels"], "BCTHW", frames)
    return {**image_of_wan(config, size), "pose_hidden_states": pose, "face_pixel_values": faces}


def skyreels(config: Any, size: Size) -> dict[str, Any]:
    """Return a timestep per latent frame if the model is block-causal, and the frame rate if the model takes it."""
    extras = image_of_wan(config, size)
    if config["num_frame_per_block"] > 1:
        extras |= {"enable_diffusion_forcing": True, "timestep": size.full(500.0, size.frames)}
    if config["inject_sample_info"]:
        extras["fps"] = size.mask(1)[:, 0].tolist()
    return extras


def anyflow(config: Any, size: Size) -> dict[str, Any]:
    """Return the start timestep and the target timestep of each latent frame."""
    timestep = size.full(500.0, size.frames)
    return {"timestep": timestep, "r_timestep": timestep - 100}


def helios(config: Any, size: Size) -> dict[str, Any]:
    """Return 16, 2 and 1 latent frames of history, the defaults of the pipeline, and the positions of all frames."""
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
    """Return the rotary tables and the offset embedding (`ofs`) if the model takes them."""
    extras: dict[str, Any] = {}
    if config["use_rotary_positional_embeddings"]:
        patch, patch_t = config["patch_size"], config.get("patch_size_t") or 1
        tokens = -(-size.frames // patch_t) * (size.height // patch) * (size.width // patch)
        extras["image_rotary_emb"] = _rotary(tokens, config, size)
    if config.get("ofs_embed_dim"):
        extras["ofs"] = torch.full((1,), 2.0, device=size.device, dtype=size.dtype)
    return extras


def consisid(config: Any, size: Size) -> dict[str, Any]:
    """Return the face encoding, and the face in five CLIP layers (24 x 24 patches and a class token each)."""
    extras = cogvideox(config, size)
    if config["is_train_face"]:
        extras["id_cond"] = size.noise(config["LFE_id_dim"])
        extras["id_vit_hidden"] = [size.text(config["LFE_vit_dim"], 577) for _ in range(config["LFE_num_scale"])]
    return extras


def hunyuan(config: Any, size: Size) -> dict[str, Any]:
    """Return the text mask, the pooled text, and the guidance scale if guidance is distilled into the model."""
    extras = {
        "encoder_attention_mask": size.mask(),
        "pooled_projections": size.noise(config["pooled_projection_dim"]),
    }
    return extras | ({"guidance": size.full(6000.0)} if config["guidance_embeds"] else {})


def framepack(config: Any, size: Size) -> dict[str, Any]:
    """Return 16, 2 and 2 latent frames of history, and the SigLIP encoding of the input image (27 x 27 patches)."""
    extras = {**hunyuan(config, size), "image_embeds": size.text(config["image_proj_dim"], 729)}
    start = 0
    for name, frames in (("history_4x", 16), ("history_2x", 2), ("clean", 2)):
        extras[f"latents_{name}"] = size.latents(config["in_channels"], "BCTHW", frames)
        extras[f"indices_latents_{name}"] = size.indices(start, frames)
        start += frames
    return {**extras, "indices_latents": size.indices(start, size.frames)}


def hunyuan_15(config: Any, size: Size) -> dict[str, Any]:
    """Return the text mask, 256 tokens of glyph text with their mask, and an image encoding of zeros (no image)."""
    image = torch.zeros(size.batch, 729, config["image_embed_dim"], device=size.device, dtype=size.dtype)
    return {
        "encoder_attention_mask": size.mask(),
        "encoder_hidden_states_2": size.text(config["text_embed_2_dim"], 256),
        "encoder_attention_mask_2": size.mask(256),
        "image_embeds": image,
    }


def packed(config: Any, size: Size) -> dict[str, Any]:
    """Return the text mask and the grid of the packed tokens."""
    sizes = {"num_frames": size.frames, "height": size.height, "width": size.width}
    return {"encoder_attention_mask": size.mask(), **sizes}


def ltx(config: Any, size: Size) -> dict[str, Any]:
    """Return the arguments of `packed`, and the units of the positions."""
    return {**packed(config, size), "rope_interpolation_scale": (8 / FRAME_RATE, 32, 32)}


def ltx2(config: Any, size: Size) -> dict[str, Any]:
    """Return the arguments of `packed`, and the sound latents of a clip of this length with their text."""
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
    """Return the text mask."""
    return {"encoder_attention_mask": size.mask()}


def mochi(config: Any, size: Size) -> dict[str, Any]:
    """Return the text mask as bool."""
    return {"encoder_attention_mask": size.mask(dtype=torch.bool)}


def allegro(config: Any, size: Size) -> dict[str, Any]:
    """Return the text mask, and the rotary frequencies with the positions of the tokens."""
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
    """Return a second text encoding if the model takes one."""
    width = config["text_embed_dim_t5"]
    return {} if width is None else {"encoder_hidden_states_t5": size.text(width)}


def cosmos(config: Any, size: Size) -> dict[str, Any]:
    """Return the frame rate, and the padding mask in pixels if the model takes one.

    Raises:
        UserError: the model takes the mask and torchvision is not installed.
    """
    extras: dict[str, Any] = {"fps": FRAME_RATE}
    if config["concat_padding_mask"]:
        from diffusers.utils.import_utils import is_torchvision_available

        if not is_torchvision_available():
            raise UserError("Cosmos resizes its padding mask with torchvision: pip install torchvision")
        mask = torch.zeros(1, 1, size.height * 8, size.width * 8, device=size.device, dtype=size.dtype)
        extras["padding_mask"] = mask
    return extras


def kandinsky5(config: Any, size: Size) -> dict[str, Any]:
    """Return the pooled text, and the rotary positions of the video and text tokens."""
    _, rows, columns = config["patch_size"]
    grid = (size.frames // config["patch_size"][0], size.height // rows, size.width // columns)
    return {
        "pooled_projections": size.noise(config["in_text_dim2"]),
        "visual_rope_pos": [size.indices(0, count) for count in grid],
        "text_rope_pos": size.indices(0, size.text_tokens),
    }


def kandinsky6(config: Any, size: Size) -> dict[str, Any]:
    """Return the pooled text and the sound latents of the clip: 44,100 samples per second, 1,024 per latent."""
    sound = -(-size.num_frames * 44_100 // (FRAME_RATE * 1024))
    return {
        "pooled_projections": size.noise(config["in_text_dim2"]),
        "audio_hidden_states": size.noise(sound, config["in_audio_dim"]),
    }


def dit(config: Any, size: Size) -> dict[str, Any]:
    """Return a class label per sample, which takes the place of a text."""
    return {"class_labels": size.mask(1)[:, 0]}


def pixart(config: Any, size: Size) -> dict[str, Any]:
    """Return the text mask, and the resolution and aspect ratio of the picture if the model takes them."""
    told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if config["use_additional_conditions"] or (
        config["use_additional_conditions"] is None and config["sample_size"] == 128
    ):
        side = size.full(1024.0, 2).to(size.dtype)
        told = {"resolution": side, "aspect_ratio": side[:, :1] / side[:, 1:]}
    return {**mask_of_text(config, size), "added_cond_kwargs": told}


def pooled(config: Any, size: Size) -> dict[str, Any]:
    """Return the pooled text (Stable Diffusion 3)."""
    return {"pooled_projections": size.noise(config["pooled_projection_dim"])}


def _places(size: Size) -> dict[str, Any]:
    axes = [size.indices(0, count) for count in (1, size.height, size.width)]
    text = torch.zeros(size.text_tokens, 3, device=size.device, dtype=size.dtype)
    return {"img_ids": torch.cartesian_prod(*axes).to(size.dtype), "txt_ids": text}


def chroma(config: Any, size: Size) -> dict[str, Any]:
    """Return the positions of picture and text tokens, and a mask of both."""
    return {**_places(size), "attention_mask": size.mask(size.text_tokens + size.height * size.width, torch.bool)}


def flux(config: Any, size: Size) -> dict[str, Any]:
    """Return the token positions, the pooled text, and the guidance scale if guidance is distilled into the model."""
    extras = {**_places(size), **pooled(config, size)}
    return extras | ({"guidance": size.full(3.5)} if config["guidance_embeds"] else {})


def motif(config: Any, size: Size) -> dict[str, Any]:
    """Return the text mask, and the SigLIP encoding of an input image (256 patches) if the model takes one."""
    width = config["image_embed_dim"]
    return mask_of_text(config, size) | ({} if width is None else {"image_embeds": size.text(width, 256)})
