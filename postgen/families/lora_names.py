"""Names of the layers that a LoRA may change, in diffusers and in the networks of the models' authors, by family.

`{}` stands for the number of a block. ComfyUI runs the authors' networks and derives the keys of a LoRA from the
layers of the loaded network (comfy/lora.py, `model_lora_keys_unet`): `diffusion_model.<author's name>`, or
`lora_unet_` and the author's name with underscores instead of dots. kohya's sd-scripts and musubi-tuner write the
latter (networks/lora_flux.py; musubi_tuner/convert_lora.py). The tables are the inverse of the renamings with which
diffusers reads the authors' weights (`diffusers.loaders.single_file_utils`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """The layer names of one family."""

    pipelines: tuple[str, ...]
    """Pipeline classes of diffusers in this family."""
    networks: tuple[str, ...]
    """Classes of the networks that a LoRA of this family changes, in these and in other pipelines."""
    plain: Mapping[str, str] = field(default_factory=dict)
    """diffusers' name -> the author's name."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The author's name of a fused layer -> diffusers' names of its parts, in the order of the outputs: q, k, v, or q,
    k, v and an MLP."""
    unchanged: tuple[str, ...] = ()
    """Names that are the same in diffusers and in the author's network."""
    read: Mapping[str, str] = field(default_factory=dict)
    """diffusers' name -> the author's name, for layers that are read but never written: patch embedding, norms,
    tables."""
    comfyui: Literal["peft", "alpha", "kohya", "diffusers"] = "peft"
    """Keys for ComfyUI. "peft": `diffusion_model.` with lora_A and lora_B. "alpha": `diffusion_model.` with lora_down,
    lora_up and alpha. ComfyUI reads both; the family has the one that diffusers reads as well. "kohya": kohya's keys.
    "diffusers": the keys of diffusers."""
    kohya: bool = True
    """Whether keys in kohya's format exist for the family, in kohya's tools or in ComfyUI."""
    kohya_whole: tuple[str, ...] = ()
    """The author's names of the layers in a block for which diffusers reads kohya's keys. diffusers reads all of these
    layers or none, and no others; empty: no such restriction."""

    def rows(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield (the author's name, diffusers' names) of every layer that can be written."""
        yield from ((name, (name,)) for name in self.unchanged)
        yield from ((theirs, (mine,)) for mine, theirs in self.plain.items())
        yield from self.fused.items()


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a diffusers layer in the author's network."""

    theirs: str
    """The author's name of the layer."""
    pattern: str
    """The author's name with `{}` instead of block numbers."""
    part: int
    """Index of the diffusers layer among the parts of the author's layer; 0 if the layer is not fused."""
    mine: str
    """diffusers' name with `{}` instead of block numbers."""


def author_name(name: str, names: Names) -> Place | None:
    """Return the place of a diffusers layer in the author's network; None if the family has no such layer."""
    for theirs, members in names.rows():
        for part, mine in enumerate(members):
            if (match := _pattern(mine).fullmatch(name)) is not None:
                return Place(theirs.format(*match.groups()), theirs, part, mine)
    return None


def own_names(theirs: str, names: Names, *, underscored: bool = False) -> tuple[str, ...]:
    """Return diffusers' names of a layer of the author.

    Args:
        theirs: the author's name of the layer.
        names: layer names of the family.
        underscored: whether `theirs` has underscores instead of dots.

    Returns:
        One name, several for a fused layer, or an empty tuple for an unknown layer.
    """
    others = ((other, (mine,)) for mine, other in names.read.items())
    for pattern, members in (*names.rows(), *others):
        if (match := _pattern(pattern.replace(".", "_") if underscored else pattern).fullmatch(theirs)) is not None:
            return tuple(mine.format(*match.groups()) for mine in members)
    return ()


def names_of(network: object) -> Names | None:
    """Return the layer names of the family of a network; None for an unknown class."""
    kind = type(network).__name__
    return next((names for names in NAMES.values() if kind in names.networks), None)


def outputs_of(shapes: Mapping[str, tuple[int, ...]], names: Names | None) -> dict[str, int]:
    """Return the numbers of outputs of a network's layers, for layers that the author calls by another name.

    Args:
        shapes: diffusers' layer name -> shape of its weight.
        names: layer names of the family; None returns an empty dict.

    Returns:
        diffusers' layer name with `{}` instead of block numbers -> number of outputs.
    """
    if names is None:
        return {}
    places = ((author_name(name, names), shape) for name, shape in shapes.items())
    return {place.mine: shape[0] for place, shape in places if place is not None and place.theirs != place.mine}


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)"))


_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def _parts(layer: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{layer}.{name}" for name in names)


_WAN_BLOCK = {
    **{f"{mine}.to_{part}": f"{theirs}.{part}" for mine, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
       for part in "qkv"},
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}  # fmt: skip
_WAN_ATTENTION = (*_parts("self_attn", ("q", "k", "v", "o")), *_parts("cross_attn", ("q", "k", "v", "o")))
_WAN_NORMS = {
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "norm2": "norm3",
    "scale_shift_table": "modulation",
}

_DOUBLE_FUSED = {"img_attn": ("transformer_blocks.{}.attn", _QKV), "txt_attn": ("transformer_blocks.{}.attn", _ADDED)}
_SINGLE = "single_transformer_blocks.{}"
_SINGLE_PARTS = (*_parts(f"{_SINGLE}.attn", _QKV), f"{_SINGLE}.proj_mlp")


def _double(attention: str, first: str, second: str, modulation: str) -> dict[str, str]:
    """Return the plain names of FLUX and HunyuanVideo, whose authors' names differ in their endings only.

    Args:
        attention: separator between the stream and the projection in the author's attention layers.
        first, second: the author's names of the two layers of an MLP.
        modulation: the author's name of the linear layer in a modulation.
    """
    block = {
        "attn.to_out.0": f"img_attn{attention}proj",
        "attn.to_add_out": f"txt_attn{attention}proj",
        "ff.net.0.proj": f"img_mlp.{first}",
        "ff.net.2": f"img_mlp.{second}",
        "ff_context.net.0.proj": f"txt_mlp.{first}",
        "ff_context.net.2": f"txt_mlp.{second}",
        "norm1.linear": f"img_mod.{modulation}",
        "norm1_context.linear": f"txt_mod.{modulation}",
    }
    rows = {f"transformer_blocks.{{}}.{mine}": f"double_blocks.{{}}.{theirs}" for mine, theirs in block.items()}
    return rows | {
        f"{_SINGLE}.proj_out": "single_blocks.{}.linear2",
        f"{_SINGLE}.norm.linear": f"single_blocks.{{}}.modulation.{modulation}",
    }


def _double_fused(attention: str) -> dict[str, tuple[str, ...]]:
    rows = {f"double_blocks.{{}}.{stream}{attention}qkv": _parts(*parts) for stream, parts in _DOUBLE_FUSED.items()}
    return {**rows, "single_blocks.{}.linear1": _SINGLE_PARTS}


_REFINER = "context_embedder.token_refiner.refiner_blocks.{}"
_REFINER_THEIRS = "txt_in.individual_token_refiner.blocks.{}"

NAMES: dict[str, Names] = {
    "wan": Names(
        pipelines=(
            *("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline", "WanVACEPipeline"),
            *("SkyReelsV2Pipeline", "SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2ImageToVideoPipeline"),
        ),
        networks=(
            "WanTransformer3DModel",
            "WanVACETransformer3DModel",
            "WanAnimateTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
        ),
        plain={
            **{f"blocks.{{}}.{mine}": f"blocks.{{}}.{theirs}" for mine, theirs in _WAN_BLOCK.items()},
            "condition_embedder.time_embedder.linear_1": "time_embedding.0",
            "condition_embedder.time_embedder.linear_2": "time_embedding.2",
            "condition_embedder.text_embedder.linear_1": "text_embedding.0",
            "condition_embedder.text_embedder.linear_2": "text_embedding.2",
            "condition_embedder.time_proj": "time_projection.1",
            "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
            "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
            "proj_out": "head.head",
        },
        read={
            **{f"blocks.{{}}.{mine}": f"blocks.{{}}.{theirs}" for mine, theirs in _WAN_NORMS.items()},
            "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
            "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
            "scale_shift_table": "head.modulation",
            "patch_embedding": "patch_embedding",
        },
        kohya_whole=(*_WAN_ATTENTION, "ffn.0", "ffn.2"),
    ),
    "hunyuan_video": Names(
        pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"),
        networks=("HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"),
        plain={
            **_double("_", "fc1", "fc2", "linear"),
            f"{_REFINER}.attn.to_out.0": f"{_REFINER_THEIRS}.self_attn_proj",
            f"{_REFINER}.ff.net.0.proj": f"{_REFINER_THEIRS}.mlp.fc1",
            f"{_REFINER}.ff.net.2": f"{_REFINER_THEIRS}.mlp.fc2",
            "context_embedder.proj_in": "txt_in.input_embedder",
            "proj_out": "final_layer.linear",
        },
        fused={**_double_fused("_"), f"{_REFINER_THEIRS}.self_attn_qkv": _parts(f"{_REFINER}.attn", _QKV)},
    ),
    "ltx": Names(
        pipelines=("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"),
        networks=("LTXVideoTransformer3DModel",),
        plain={
            "proj_in": "patchify_proj",
            "proj_out": "proj_out",
            "time_embed.linear": "adaln_single.linear",
            "time_embed.emb.timestep_embedder.linear_1": "adaln_single.emb.timestep_embedder.linear_1",
            "time_embed.emb.timestep_embedder.linear_2": "adaln_single.emb.timestep_embedder.linear_2",
        },
        unchanged=(
            *_parts("transformer_blocks.{}.attn1", (*_QKV, "to_out.0")),
            *_parts("transformer_blocks.{}.attn2", (*_QKV, "to_out.0")),
            *_parts("transformer_blocks.{}.ff.net", ("0.proj", "2")),
            *_parts("caption_projection", ("linear_1", "linear_2")),
        ),
    ),
    # ComfyUI runs CogVideoX with third-party nodes, which use diffusers' network. kohya's tools do not support it.
    "cogvideox": Names(
        pipelines=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXVideoToVideoPipeline"),
        networks=("CogVideoXTransformer3DModel",),
        unchanged=(
            *_parts("transformer_blocks.{}.attn1", (*_QKV, "to_out.0")),
            *_parts("transformer_blocks.{}", ("ff.net.0.proj", "ff.net.2", "norm1.linear", "norm2.linear")),
            *("patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out"),
        ),
        comfyui="diffusers",
        kohya=False,
    ),
    "flux": Names(
        pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxKontextPipeline"),
        networks=("FluxTransformer2DModel",),
        plain=_double(".", "0", "2", "lin"),
        fused=_double_fused("."),
        comfyui="alpha",
    ),
    # ComfyUI maps diffusers' names to parts of the author's fused layers (comfy/utils.py, `mmdit_to_diffusers`).
    "stable_diffusion_3": Names(
        pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
        networks=("SD3Transformer2DModel",),
        unchanged=(
            *_parts("transformer_blocks.{}.attn", (*_QKV, "to_out.0", *_ADDED, "to_add_out")),
            *_parts("transformer_blocks.{}.attn2", (*_QKV, "to_out.0")),
            *_parts("transformer_blocks.{}", ("ff.net.0.proj", "ff.net.2")),
            *_parts("transformer_blocks.{}", ("ff_context.net.0.proj", "ff_context.net.2")),
            *_parts("transformer_blocks.{}", ("norm1.linear", "norm1_context.linear")),
        ),
        comfyui="diffusers",
        kohya=False,
    ),
    # ComfyUI and kohya's tools both read diffusers' names of the UNet's layers, with underscores instead of dots.
    "stable_diffusion": Names(
        pipelines=("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
        networks=("UNet2DConditionModel",),
        unchanged=tuple(
            f"{part}.attentions.{{}}.{layer}"
            for part in ("down_blocks.{}", "mid_block", "up_blocks.{}")
            for layer in (
                *("proj_in", "proj_out"),
                *_parts("transformer_blocks.{}.attn1", (*_QKV, "to_out.0")),
                *_parts("transformer_blocks.{}.attn2", (*_QKV, "to_out.0")),
                *_parts("transformer_blocks.{}.ff.net", ("0.proj", "2")),
            )
        ),
        comfyui="kohya",
    ),
}
"""Family name -> its layer names."""
