"""open_clip's CLIP stated once more, straight from its weights: names, shapes, and the two features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TINY: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 16, "head_width": 8, "patch_size": 14},
    "text_cfg": {"context_length": 16, "vocab_size": 519, "width": 24, "heads": 3, "layers": 2},
}

State = dict[str, Tensor]


def _block(start: str, width: int, ffn: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{start}ln_1.weight": (width,),
        f"{start}ln_1.bias": (width,),
        f"{start}attn.in_proj_weight": (3 * width, width),
        f"{start}attn.in_proj_bias": (3 * width,),
        f"{start}attn.out_proj.weight": (width, width),
        f"{start}attn.out_proj.bias": (width,),
        f"{start}ln_2.weight": (width,),
        f"{start}ln_2.bias": (width,),
        f"{start}mlp.c_fc.weight": (ffn, width),
        f"{start}mlp.c_fc.bias": (ffn,),
        f"{start}mlp.c_proj.weight": (width, ffn),
        f"{start}mlp.c_proj.bias": (width,),
    }


def shapes(cfg: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every weight of a checkpoint, as open_clip names and shapes it."""
    vision, text, out = cfg["vision_cfg"], cfg["text_cfg"], cfg["embed_dim"]
    w, t, patch = vision["width"], text["width"], vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    whole: dict[str, tuple[int, ...]] = {
        "positional_embedding": (text["context_length"], t),
        "text_projection": (t, out),
        "logit_scale": (),
        "token_embedding.weight": (text["vocab_size"], t),
        "ln_final.weight": (t,),
        "ln_final.bias": (t,),
        "visual.class_embedding": (w,),
        "visual.positional_embedding": (patches + 1, w),
        "visual.proj": (w, out),
        "visual.conv1.weight": (w, 3, patch, patch),
        "visual.ln_pre.weight": (w,),
        "visual.ln_pre.bias": (w,),
        "visual.ln_post.weight": (w,),
        "visual.ln_post.bias": (w,),
    }
    for layer in range(vision["layers"]):
        whole |= _block(f"visual.transformer.resblocks.{layer}.", w, 4 * w)
    for layer in range(text["layers"]):
        whole |= _block(f"transformer.resblocks.{layer}.", t, 4 * t)
    return whole


def random_state(cfg: dict[str, Any], seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes(cfg).items()}
    state["logit_scale"] = torch.tensor(3.0)
    return state


def _gelu(x: Tensor, quick: bool) -> Tensor:
    return x * torch.sigmoid(1.702 * x) if quick else F.gelu(x)


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.layer_norm(x, weight.shape, weight, state[f"{name}.bias"])


def _transformer(state: State, start: str, x: Tensor, heads: int, causal: bool, quick: bool) -> Tensor:
    layer = 0
    while f"{start}{layer}.ln_1.weight" in state:
        name = f"{start}{layer}."
        y = _norm(state, f"{name}ln_1", x)
        qkv = F.linear(y, state[f"{name}attn.in_proj_weight"], state[f"{name}attn.in_proj_bias"])
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if causal:
            scores = scores + torch.full(scores.shape[-2:], float("-inf")).triu(1)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, state[f"{name}attn.out_proj.weight"], state[f"{name}attn.out_proj.bias"])
        y = _norm(state, f"{name}ln_2", x)
        y = _gelu(F.linear(y, state[f"{name}mlp.c_fc.weight"], state[f"{name}mlp.c_fc.bias"]), quick)
        x = x + F.linear(y, state[f"{name}mlp.c_proj.weight"], state[f"{name}mlp.c_proj.bias"])
        layer += 1
    return x


def image_features(state: State, cfg: dict[str, Any], pixels: Tensor) -> Tensor:
    vision = cfg["vision_cfg"]
    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=vision["patch_size"]).flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], 1) + state["visual.positional_embedding"]
    x = _norm(state, "visual.ln_pre", x)
    heads, quick = vision["width"] // vision["head_width"], bool(cfg.get("quick_gelu"))
    x = _transformer(state, "visual.transformer.resblocks.", x, heads, False, quick)
    return F.normalize(_norm(state, "visual.ln_post", x[:, 0]) @ state["visual.proj"], dim=-1)


def text_features(state: State, cfg: dict[str, Any], tokens: Tensor) -> Tensor:
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"][: tokens.shape[1]]
    quick = bool(cfg.get("quick_gelu"))
    x = _transformer(state, "transformer.resblocks.", x, cfg["text_cfg"]["heads"], True, quick)
    x = _norm(state, "ln_final", x)[torch.arange(len(x)), tokens.argmax(-1)]
    return F.normalize(x @ state["text_projection"], dim=-1)


def save_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer with the vocabulary of `TINY`: bytes, some merges, and start and end as the last two."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    merges = [("r", "e"), ("re", "d</w>"), ("b", "l"), ("bl", "u"), ("o", "n")]
    words = [*symbols, *(f"{s}</w>" for s in symbols), *("".join(pair) for pair in merges)]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    assert len(vocab) == TINY["text_cfg"]["vocab_size"]
    CLIPTokenizer(vocab=vocab, merges=merges).save_pretrained(folder)
