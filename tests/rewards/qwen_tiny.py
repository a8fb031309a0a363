"""A tiny Qwen2-VL in the layout that VideoAlign and HPSv3 publish, and its patches cut by loops."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def tokenizer(folder: Path, text: str) -> Any:
    """Write a tokenizer of whole words, those of a text, and return it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *sorted(set(re.findall(r"\w+|[^\w\s]+", text)))]
    built = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*words, *SPECIAL])}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=built, unk_token="<unk>", pad_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:]
    )
    fast.save_pretrained(folder)
    return fast


def config(words: Any) -> Any:
    """The shape of a two-layer Qwen2-VL over a tokenizer's words, with spare rows as the real one has."""
    from transformers import Qwen2VLConfig

    image, video = words.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    return Qwen2VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(words) + 30,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=False,
    )


def network(shape: Any, rows: int, seed: int = 0) -> nn.Module:
    """A random `Qwen2VLForConditionalGeneration` with so many words, as after the special tokens were added."""
    from transformers import Qwen2VLForConditionalGeneration

    torch.manual_seed(seed)
    net = Qwen2VLForConditionalGeneration(shape)
    net.resize_token_embeddings(rows)
    # Large, so that attention is sharp and a wrong position, token or pixel moves the score.
    for parameter in net.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.4)
    return net.eval()


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of transformers 4.45, with which both rewards were trained."""
    return {
        name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1): weight
        for name, weight in state.items()
    }


def patches(frames: Tensor) -> Tensor:
    """Frames (T,3,H,W) cut by loops: pairs of frames, blocks of 2x2 patches, then the patches of a block."""
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    x = (frames - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    found = []
    for t in range(0, len(x), 2):
        for y in range(0, x.shape[2], 28):
            for z in range(0, x.shape[3], 28):
                for dy in (0, 14):
                    for dz in (0, 14):
                        block = x[t : t + 2, :, y + dy : y + dy + 14, z + dz : z + dz + 14]
                        found.append(block.permute(1, 0, 2, 3).flatten())
    return torch.stack(found)
