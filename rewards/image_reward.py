"""ImageReward: BLIP trained on human rankings of pictures (arXiv 2304.05977), built on the BLIP of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from postgen.errors import UserError
from postgen.rewards.aesthetic import chain_state, linear_chain
from postgen.rewards.frames import FrameReward
from postgen.rewards.pictures import clip_pixels
from postgen.rewards.weights import State, assemble, fill, find_file, read_state, tokenizer_of

if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipVisionConfig

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and deviation of the raw score over the training set."""

TEXT_LENGTH = 35

_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.": "encoder.layers.",
    ".attn.qkv": ".self_attn.qkv",
    ".attn.proj": ".self_attn.projection",
    ".norm1": ".layer_norm1",
    ".norm2": ".layer_norm2",
}
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
_PLACES = {"blip.visual_encoder.": "vision", "blip.text_encoder.": "text", "mlp.layers.": "head"}

LARGE: dict[str, dict[str, Any]] = {
    "vision": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
    },
    "text": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}
"""The published configuration: ViT-L/16 and a BERT-base with cross-attention to the picture."""


class BlipScore(nn.Module):
    """BLIP with a score: vision encoder -> text encoder with cross-attention -> first token -> linear head.

    Args:
        vision: a `BlipVisionModel`.
        text: a `BlipTextModel` with cross-attention to the picture.
        head: see `linear_chain`.
    """

    def __init__(self, vision: nn.Module, text: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    def forward(self, pixels_N3HW: Tensor, tokens_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """Return the raw scores (N,)."""
        states = self.vision(pixel_values=pixels_N3HW).last_hidden_state
        looked = self.text(
            input_ids=tokens_NL, attention_mask=mask_NL, encoder_hidden_states=states, is_decoder=False
        ).last_hidden_state
        scores: Tensor = self.head(looked[:, 0])
        return scores[:, 0]


def blip_configs(shape: Mapping[str, Mapping[str, Any]]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Return transformers' configurations of the two encoders, with the constants of the published code."""
    from transformers import BlipTextConfig, BlipVisionConfig

    vision = BlipVisionConfig(**shape["vision"], hidden_act="gelu", layer_norm_eps=1e-6, attention_dropout=0.0)
    text = BlipTextConfig(
        **shape["text"],
        encoder_hidden_size=vision.hidden_size,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        max_position_embeddings=512,
        pad_token_id=0,
        is_decoder=True,  # builds the cross-attention layers; the attention mask is still that of an encoder
    )
    return vision, text


def from_published(state: Mapping[str, Tensor]) -> dict[str, State]:
    """Rename the published weights (timm's ViT, BLIP's BERT) to those of transformers, in `vision`, `text` and `head`.

    Unknown names are collected in `rest`.
    """
    parts: dict[str, State] = {"vision": {}, "text": {}, "head": {}, "rest": {}}
    for name, weight in state.items():
        if not name.startswith(_UNUSED):
            start = next((s for s in _PLACES if name.startswith(s)), "")
            parts[_PLACES.get(start, "rest")][name.removeprefix(start)] = weight
    parts["vision"] = {_vision_name(name): weight for name, weight in parts["vision"].items()}
    parts["head"] = chain_state(parts["head"], "")
    return parts


def _vision_name(name: str) -> str:
    if name.startswith("norm."):
        return f"post_layernorm.{name.removeprefix('norm.')}"
    for old, new in _VISION.items():
        name = name.replace(old, new)
    return name


class ImageReward(FrameReward):
    """Predict how much people like a frame for its prompt, about -2 to 2, with mean 0 over the training set.

    Args:
        model: Hub id, local folder or file (Apache-2.0).
        file: the checkpoint in `model`.
        shape: configuration of the two encoders.
        tokenizer: Hub id or local folder of BERT's tokenizer.
        frames, reduce, device, dtype: see `FrameReward`.
    """

    name = "image_reward"

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        file: str = "ImageReward.pt",
        shape: Mapping[str, Mapping[str, Any]] = LARGE,
        tokenizer: str = "bert-base-uncased",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.model, self.file, self.shape, self.tokenizer = model, file, shape, tokenizer
        self._tokenizer: Any = None

    def needed(self) -> Sequence[tuple[str, str]]:
        """Return the place of the checkpoint."""
        return ((self.model, self.file),)

    def build(self) -> nn.Module:
        """Load the checkpoint.

        Raises:
            UserError: the checkpoint cannot be found, or its weights do not fit.
        """
        from transformers import BlipTextModel, BlipVisionModel

        path = find_file(self.model, self.file)
        parts = from_published(read_state(path))
        vision, text = blip_configs(self.shape)
        if parts["rest"]:
            raise UserError(f"the weights of {path} are those of another model: they include {min(parts['rest'])}")
        return BlipScore(
            assemble(BlipVisionModel, vision, parts["vision"], path),
            assemble(BlipTextModel, text, parts["text"], path, add_pooling_layer=False),
            fill(linear_chain(text.hidden_size), parts["head"], path),
        )

    def frame_scores(self, frames_BK3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the standardised scores (B,K)."""
        count = frames_BK3HW.shape[1]
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self.tokenizer)
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        )
        if int(tokens["input_ids"].max()) >= self.shape["text"]["vocab_size"]:
            raise UserError(
                f"the tokenizer {self.tokenizer} is not BERT's: its vocabulary is larger than the network's"
            )
        pixels = clip_pixels(frames_BK3HW.flatten(0, 1), self.shape["vision"]["image_size"], half_even=True)
        rows = [tokens[k].to(self.device).repeat_interleave(count, 0) for k in ("input_ids", "attention_mask")]
        raw: Tensor = self.net(pixels.to(self.dtype), *rows)
        return ((raw.float() - MEAN) / STD).view(frames_BK3HW.shape[:2])
