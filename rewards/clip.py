"""Shared parts of the CLIP rewards: the network in transformers, conversion from open_clip, and the two embeddings.

CLIP: arXiv 2103.00020. open_clip publishes the same networks with other weight names; `from_open_clip` maps them.
Padding of the text does not change the result: the text mask is causal, and the embedding is read at the first end
token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from postgen.errors import UserError
from postgen.rewards.frames import FrameReward
from postgen.rewards.pictures import CLIP_MEAN, CLIP_STD, centre_crop, clip_pixels, normalise, resize, shorter_side
from postgen.rewards.weights import State, assemble, find_file, pretrained, read_state, tokenizer_of

if TYPE_CHECKING:
    from transformers import CLIPConfig

VIT_H_14: dict[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
"""open_clip's configuration of ViT-H-14, the network of HPSv2, PickScore and LAION's CLIP H/14."""

H_14_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
# open_clip stores these matrices as (in, out), for multiplication from the right.
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_IN_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)(?:\.|_)(weight|bias)")


def clip_config(shape: Mapping[str, Any]) -> CLIPConfig:
    """Convert an open_clip configuration (`model_cfg` of its JSON file) to that of transformers.

    Raises:
        UserError: the network is not a plain vision transformer with a plain text transformer.
    """
    from transformers import CLIPConfig

    vision, text = shape["vision_cfg"], shape["text_cfg"]
    odd = [k for k in ("timm_model_name", "attentional_pool") if vision.get(k)] + (
        ["hf_model_name"] * bool(text.get("hf_model_name"))
    )
    if odd:
        raise UserError(f"only plain open_clip vision transformers are supported, this one has {', '.join(odd)}")
    common = {"hidden_act": "quick_gelu" if shape.get("quick_gelu") else "gelu", "projection_dim": shape["embed_dim"]}
    return CLIPConfig(
        projection_dim=shape["embed_dim"],
        vision_config={
            **common,
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "patch_size": vision["patch_size"],
            "image_size": vision["image_size"],
        },
        text_config={
            **common,
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            # The last two tokens of the vocabulary; transformers reads the text embedding at the first end token.
            "bos_token_id": text["vocab_size"] - 2,
            "eos_token_id": text["vocab_size"] - 1,
        },
    )


def from_open_clip(state: Mapping[str, Tensor]) -> State:
    """Rename open_clip's weights to those of `CLIPModel`. Unknown names are kept, so that loading reports them."""
    renamed: State = {}
    for name, weight in state.items():
        if name == "attn_mask":
            continue
        if name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = weight.T.contiguous()
        elif match := _IN_BLOCK.fullmatch(name):
            visual, layer, part, kind = match.groups()
            renamed |= _in_block(f"{'vision' if visual else 'text'}_model.encoder.layers.{layer}.", part, kind, weight)
        else:
            renamed[_WHOLE.get(name, name)] = weight
    return renamed


def _in_block(start: str, part: str, kind: str, weight: Tensor) -> State:
    if part == "attn.in_proj":
        return {
            f"{start}self_attn.{p}_proj.{kind}": w.contiguous() for p, w in zip("qkv", weight.chunk(3), strict=True)
        }
    return {f"{start}{_BLOCK.get(part, part)}.{kind}": weight}


def open_clip_net(path: Path, shape: Mapping[str, Any]) -> nn.Module:
    """Load an open_clip checkpoint into a `CLIPModel` of the given shape.

    Raises:
        UserError: the file cannot be read, or its weights are those of another network.
    """
    from transformers import CLIPModel

    net: nn.Module = assemble(CLIPModel, clip_config(shape), from_open_clip(read_state(path)), path)
    return net


def open_clip_settings(model: str) -> dict[str, Any]:
    """Read the `open_clip_config.json` next to open_clip's weights: shape (`model_cfg`) and `preprocess_cfg`.

    Raises:
        UserError: the file is missing, or its preprocessing is not bicubic resizing with a crop or a squash.
    """
    path = find_file(model, "open_clip_config.json")
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    seen = settings.setdefault("preprocess_cfg", {})
    for key, allowed in (("resize_mode", ("shortest", "squash")), ("interpolation", ("bicubic",))):
        if seen.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path} asks for {key}={seen[key]!r}: supported are {', '.join(allowed)}")
    return settings


def open_clip_pixels(frames_N3HW: Tensor, side: int, seen: Mapping[str, Any]) -> Tensor:
    """Preprocess frames for an open_clip network, as its `preprocess_cfg` states."""
    if seen.get("resize_mode", "shortest") == "squash":
        sized = resize(frames_N3HW, side, side)
    else:
        sized = centre_crop(resize(frames_N3HW, *shorter_side(frames_N3HW, side)), side, half_even=True)
    return normalise(sized, tuple(seen.get("mean") or CLIP_MEAN), tuple(seen.get("std") or CLIP_STD))


class ClipReward(FrameReward):
    """Base class of the rewards that compare a frame with a text, or rate a frame, with CLIP.

    Args:
        model: Hub id or local folder.
        tokenizer: Hub id or local folder; None uses the tokenizer of `model`.
        frames, reduce, device, dtype: see `FrameReward`.
    """

    model: str

    def __init__(self, model: str | None = None, tokenizer: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.model = model or type(self).model
        self.tokenizer = tokenizer
        self._tokenizer: Any = None

    def needed(self) -> Sequence[tuple[str, str]]:
        """Return the place of the CLIP model."""
        return ((self.model, ""),)

    def build(self) -> nn.Module:
        """Load a `CLIPModel`.

        Raises:
            UserError: the model cannot be found.
        """
        from transformers import CLIPModel

        net: nn.Module = pretrained(CLIPModel, self.model)
        return net

    def pixels(self, frames_N3HW: Tensor) -> Tensor:
        """Preprocess the frames for this network."""
        return clip_pixels(frames_N3HW, self.net.config.vision_config.image_size)

    def image_features(self, frames_N3HW: Tensor) -> Tensor:
        """Return the normalised image embeddings (N,D) of frames in [0,1]."""
        states = self.net.vision_model(self.pixels(frames_N3HW).to(self.dtype)).pooler_output
        return normalize(self.net.visual_projection(states).float(), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return the normalised text embeddings (B,D); texts are truncated to the context length of the network."""
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self.tokenizer or self.model)
        length = self.net.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        states = self.net.text_model(tokens["input_ids"].to(self.device)).pooler_output
        return normalize(self.net.text_projection(states).float(), dim=-1)

    def cosines(self, frames_BK3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosine similarity of each frame and the prompt of its clip, (B,K)."""
        images = self.image_features(frames_BK3HW.flatten(0, 1)).unflatten(0, frames_BK3HW.shape[:2])
        return torch.einsum("bkd,bd->bk", images, self.text_features(prompts))
