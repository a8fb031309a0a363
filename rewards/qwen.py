"""Shared parts of the rewards on Qwen2-VL: patches, chat template, checkpoint names, and the score head.

Two properties of the published rewards determine this code. First, their forward pass does not pass position ids to
the language model. They were therefore trained with positions 0, 1, 2, ... on all three axes, instead of Qwen2-VL's
positions in time, height and width. Second, the head reads the states of special tokens in the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from postgen.errors import UserError
from postgen.rewards.pictures import CLIP_MEAN, CLIP_STD, normalise, resize
from postgen.rewards.weights import State, assemble, tokenizer_of

PATCH, MERGE, TIME = 14, 2, 2
"""Pixels per side of a patch, patches per side that are merged into a token, frames per patch."""

FACTOR = PATCH * MERGE

PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}

_PLACES = {
    "visual.": "body.visual.",
    "model.visual.": "body.visual.",
    "model.language_model.": "body.language_model.",
    "model.": "body.language_model.",
    "rm_head.": "head.",
}


def fitting_size(size: Sequence[int], least: int, most: int) -> tuple[int, int]:
    """Return a size of similar shape with sides that are multiples of 28 and an area in px from `least` to `most`.

    >>> fitting_size((480, 832), 100352, 200704)
    (336, 588)
    """
    height, width = size
    high, wide = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width))
    if high * wide > most:
        scale = math.sqrt(height * width / most)
        high, wide = (math.floor(side / scale / FACTOR) * FACTOR for side in (height, width))
    elif high * wide < least:
        scale = math.sqrt(least / (height * width))
        high, wide = (math.ceil(side * scale / FACTOR) * FACTOR for side in (height, width))
    if not high * wide:
        raise UserError(
            f"frames of {width}x{height} are too narrow for this reward: one side would shrink to 0 px at an area of"
            f" {most} px; give clips that are closer to a square"
        )
    return high, wide


def patches_of(frames_T3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Cut frames into the patches that the vision encoder reads; the 2x2 patches of a token are consecutive.

    Args:
        frames_T3HW: in [0,1], sides multiples of 28; an odd number of frames is padded with the last frame.

    Returns:
        Patches (N,1176), and the patch grid (time, height, width) on the CPU.
    """
    if len(frames_T3HW) % TIME:
        frames_T3HW = torch.cat([frames_T3HW, frames_T3HW[-1:]])
    time, (height, width) = len(frames_T3HW) // TIME, (side // PATCH for side in frames_T3HW.shape[-2:])
    x = normalise(frames_T3HW, CLIP_MEAN, CLIP_STD)
    x = x.view(time, TIME, 3, height // MERGE, MERGE, PATCH, width // MERGE, MERGE, PATCH)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(time * height * width, -1)
    return x, torch.tensor([time, height, width])


def chat(text: str, tokens: int, kind: str) -> str:
    """Return Qwen2-VL's chat for one question: `tokens` placeholders of a picture or a video, then the text."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{PADS[kind] * tokens}<|vision_end|>{text}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def plain(prompt: str) -> str:
    """Break up special tokens in a prompt, so that a prompt cannot imitate the special tokens of the rubric.

    >>> plain("a <|VQ_reward|> sign")
    'a < |VQ_reward|> sign'
    """
    return prompt.replace("<|", "< |")


def merge_lora(state: Mapping[str, Tensor], scale: float) -> State:
    """Merge LoRA adapters into their base layers: W + scale B A, computed in float32.

    Args:
        state: state dict with peft's names: `X.base_layer.weight`, `X.lora_A.default.weight`,
            `X.lora_B.default.weight`.
        scale: alpha / rank.
    """
    merged = {name.replace(".base_layer.", "."): w for name, w in state.items() if ".lora_" not in name}
    for name in state:
        if match := re.fullmatch(r"(.+)\.lora_A\.(?:\w+\.)?weight", name):
            up = state[name.replace(".lora_A.", ".lora_B.")].float()
            target = f"{match[1]}.weight"
            merged[target] = (merged[target].float() + scale * (up @ state[name].float())).to(merged[target].dtype)
    return merged


def split_state(state: Mapping[str, Tensor]) -> dict[str, State]:
    """Split a state dict, from any version of transformers, into `body` (a `Qwen2VLModel`) and `head`.

    The unused output layer is dropped; unknown names are collected in `rest`.
    """
    parts: dict[str, State] = {"body": {}, "head": {}, "rest": {}}
    for full, weight in state.items():
        name = full.removeprefix("base_model.model.")
        if name.startswith("lm_head."):
            continue
        start = max((s for s in _PLACES if name.startswith(s)), key=len, default="")
        place, _, rest = (_PLACES.get(start, "rest.") + name.removeprefix(start)).partition(".")
        parts[place][rest] = weight
    return parts


class QwenScore(nn.Module):
    """Qwen2-VL with a head on the last hidden states of some tokens.

    Args:
        body: a `Qwen2VLModel`.
        head: module from the width of the body to the scores.
        kind: "image" or "video".
    """

    def __init__(self, body: nn.Module, head: nn.Module, kind: str) -> None:
        super().__init__()
        self.body, self.head, self.kind = body, head, kind

    def forward(self, tokens_BL: Tensor, mask_BL: Tensor, patches: Tensor, grids_B3: Tensor, marks: Tensor) -> Tensor:
        """Return the head's outputs (B,M,out) for the M tokens of each row that are in `marks`."""
        names = (
            ("pixel_values", "image_grid_thw") if self.kind == "image" else ("pixel_values_videos", "video_grid_thw")
        )
        length = tokens_BL.shape[1]
        states = self.body(
            input_ids=tokens_BL,
            attention_mask=mask_BL,
            position_ids=torch.arange(length, device=tokens_BL.device).expand(3, len(tokens_BL), length),
            use_cache=False,
            **dict(zip(names, (patches, grids_B3), strict=True)),
        ).last_hidden_state
        at_marks = states[torch.isin(tokens_BL, marks)].view(len(tokens_BL), -1, states.shape[-1])
        scores: Tensor = self.head(at_marks)
        return scores.float()


def assemble_score(base: str, parts: dict[str, State], head: nn.Module, kind: str, source: object) -> QwenScore:
    """Build the network from the output of `split_state`; the vocabulary has the size of the checkpoint's embedding.

    Raises:
        UserError: the base model cannot be found, or the weights do not fit.
    """
    from transformers import Qwen2VLConfig, Qwen2VLModel

    if parts["rest"]:
        raise UserError(f"the weights of {source} are those of another model: they include {min(parts['rest'])}")
    try:
        config = Qwen2VLConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the configuration of {base}: give `base` a local folder of Qwen2-VL") from error
    text: Any = config.text_config
    words = parts["body"].get("language_model.embed_tokens.weight")
    text.vocab_size = text.vocab_size if words is None else len(words)
    return QwenScore(assemble(Qwen2VLModel, config, parts["body"], source), head, kind)


class Asker:
    """Prepares the inputs of `QwenScore` from clips and texts.

    Args:
        tokenizer: Hub id or local folder of Qwen2-VL's tokenizer.
        marks: special tokens that are added to the tokenizer, in this order.
        kind: "image" or "video".
    """

    def __init__(self, tokenizer: str, marks: Sequence[str], kind: str) -> None:
        self.tokenizer: Any = tokenizer_of(tokenizer)
        self.tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
        self.marks, self.kind = self.tokenizer.convert_tokens_to_ids(list(marks)), kind

    def __call__(self, clips: Sequence[Tensor], texts: Sequence[str], size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Resize clips of one device to `size`; return tokens, mask, patches, grids and marks on this device."""
        cut = [patches_of(resize(clip, *size)) for clip in clips]
        chats = self.tokenizer([chat(text, 1, self.kind) for text in texts])["input_ids"]
        rows = [self._spread(torch.tensor(row), grid) for row, (_, grid) in zip(chats, cut, strict=True)]
        tokens = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        device = cut[0][0].device
        patches, grids = torch.cat([p for p, _ in cut]), torch.stack([g for _, g in cut]).to(device)
        return tokens.to(device), mask.to(device), patches, grids, torch.tensor(self.marks, device=device)

    def _spread(self, row: Tensor, grid: Tensor) -> Tensor:
        """Repeat the placeholder once per token of the clip; much faster than tokenising all placeholders."""
        place = row == self.tokenizer.convert_tokens_to_ids(PADS[self.kind])
        return row.repeat_interleave(torch.where(place, int(grid.prod()) // MERGE**2, 1))
