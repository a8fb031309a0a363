"""Rewards with random weights in the published shapes: valid for time and memory, but the scores have no meaning."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgen.rewards.clip import VIT_H_14, ClipReward, clip_config
from postgen.rewards.qwen import Asker, QwenScore, fitting_size
from postgen.rewards.videoalign import CONSTANTS, LEAST_PIXELS, MARKS, MOST_PIXELS, VideoAlign, rubric, sampled

VIT_L_14: dict[str, Any] = {
    "embed_dim": 768,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
}
QWEN2_VL_2B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
}
_QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
_FPS = 8.0


def words_tokenizer(text: str, special: tuple[str, ...], end: str | None = None, last: int | None = None) -> Any:
    """Return a tokenizer for the words of a text. The special tokens have the last numbers.

    Args:
        text: text whose words are the vocabulary.
        special: special tokens; the first one is the padding token.
        end: special token to append to every text, or None.
        last: number of the last special token; None places the special tokens directly after the words.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *sorted(set(re.findall(r"\w+|[^\w\s]+", text)))]
    first = len(words) if last is None else last + 1 - len(special)
    table = {word: number for number, word in enumerate(words)}
    table |= {word: first + number for number, word in enumerate(special)}
    built = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    if end is not None:
        built.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, table[end])])
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        unk_token="<unk>",
        pad_token=special[0],
        additional_special_tokens=[word for word in special[1:] if word != "<unk>"],
    )


class RandomClip(ClipReward):
    """A CLIP score with random weights.

    Args:
        shape: config of the network in the form of open_clip.
        words: text whose words the tokenizer knows.
    """

    name = "random_clip"
    model = "random"

    def __init__(self, shape: dict[str, Any] = VIT_L_14, words: str = "", **options: Any) -> None:
        super().__init__(**options)
        self.shape = shape
        self._tokenizer = words_tokenizer(
            words, ("<start>", "<end>"), end="<end>", last=shape["text_cfg"]["vocab_size"] - 1
        )

    def build(self) -> nn.Module:
        """Build the network with random weights on the device."""
        from transformers import CLIPModel

        with torch.device(self.device):
            net: nn.Module = CLIPModel(clip_config(self.shape))
        return net

    def frame_scores(self, frames_BK3HW: Tensor, prompts: Any) -> Tensor:
        """Return the cosine similarities of frames and prompts."""
        return self.cosines(frames_BK3HW, prompts)

    def forward_only(self, clips: list[Tensor], prompts: list[str]) -> Callable[[], Any]:
        """Return a function that runs only the forward passes of the network on these clips.

        All preprocessing is done before this method returns.
        """
        from postgen.rewards.frames import uniform_frames

        frames = torch.cat([uniform_frames(clip, self.frames) for clip in clips]).to(self.device)
        pixels = self.pixels(frames).to(self.dtype)
        tokens = self._tokenizer(prompts, padding=True, return_tensors="pt")["input_ids"].to(self.device)
        return lambda: (self.net.vision_model(pixels), self.net.text_model(tokens))


class RandomVideoAlign(VideoAlign):
    """VideoAlign with random weights.

    Args:
        folder: folder in which the tokenizer is written.
        words: text whose words the tokenizer knows, in addition to the words of the rubric.
        shape: keyword arguments of `Qwen2VLConfig`.
    """

    name = "random_videoalign"

    def __init__(self, folder: Path, words: str = "", shape: dict[str, Any] = QWEN2_VL_2B, **place: Any) -> None:
        super().__init__(**place)
        self.folder, self.words, self.shape = folder, words, shape

    def build(self) -> nn.Module:
        """Build the network with random weights on the device, and write its tokenizer."""
        from transformers import Qwen2VLConfig, Qwen2VLModel

        known = f"{rubric()} {self.words} system user assistant You are a helpful assistant."
        tokenizer = words_tokenizer(known, _QWEN_SPECIAL)
        tokenizer.save_pretrained(self.folder)
        image, video = tokenizer.convert_tokens_to_ids(list(_QWEN_SPECIAL[-2:]))
        self.asker = Asker(str(self.folder), MARKS, "video")
        self.settings = {"data_config": {"max_frame_pixels": MOST_PIXELS}, "inference_config": CONSTANTS}
        config = Qwen2VLConfig(**self.shape, image_token_id=image, video_token_id=video)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                width = self.shape["text_config"]["hidden_size"]
                return QwenScore(Qwen2VLModel(config), nn.Linear(width, 3, bias=False), "video")
        finally:
            torch.set_default_dtype(before)

    def forward_only(self, clips: list[Tensor], prompts: list[str]) -> Callable[[], Any]:
        """Return a function that runs only the forward pass of the network on these clips.

        All preprocessing is done before this method returns.
        """
        self.load()
        assert self.asker is not None
        picked = [sampled(clip.to(self.device), _FPS) for clip in clips]
        size = fitting_size(picked[0].shape[-2:], LEAST_PIXELS, MOST_PIXELS)
        texts = [rubric().format(text_prompt=prompt) for prompt in prompts]
        tokens, mask, patches, grids, marks = self.asker(picked, texts, size)
        return lambda: self.net(tokens, mask, patches.to(self.dtype), grids, marks)


def shapes(folder: Path, words: str, device: str, dtype: torch.dtype) -> dict[str, RandomClip | RandomVideoAlign]:
    """Return the three rewards to time, by the names of their gates."""
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    return {
        "clip_l": RandomClip(VIT_L_14, words, **place),
        "clip_h": RandomClip(VIT_H_14, words, **place),
        "qwen2_vl_2b": RandomVideoAlign(folder, words, **place),
    }
