"""Text encoder of the embedded model: a small UMT5, and cross-attention with padding at no cost.

Wan pads prompt embeddings with zeros to 512 tokens and uses no mask, so all padded keys are equal. Attention over n
equal keys equals attention over one key with log(n) added to its score. `PaddedCrossAttention` uses this fact to train
on the short sequence, with the same result as the pipeline's 512 tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from postgen.training.tokenizers import MAX_SEQUENCE_LENGTH


def new_text_encoder(vocabulary: int, width: int, layers: int, heads: int) -> Any:
    """Return a `UMT5EncoderModel` with random weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    # UMT5Config accepts is_gated_act and tie_word_embeddings, but its declared signature lacks them.
    config = UMT5Config(  # type: ignore[call-arg]
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=layers,
        num_decoder_layers=0,
        num_heads=heads,
        dropout_rate=0.0,
        is_gated_act=True,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    return UMT5EncoderModel(config)


def encode_text(text_encoder: Any, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return embeddings (B, L+1, D), zero after each text as in the pipeline, and score offsets of the keys (B, L+1).

    The offset is 0 for tokens, log(512 - n) for the first zero, which represents all zeros, and -inf after it.
    """
    mask = ids_BL != 0
    hidden = text_encoder(input_ids=ids_BL.long(), attention_mask=mask.long()).last_hidden_state
    hidden = F.pad(hidden * mask[..., None], (0, 0, 0, 1))
    position = torch.arange(ids_BL.shape[1] + 1, device=ids_BL.device)
    count = mask.sum(1, keepdim=True)
    repeats = torch.log((MAX_SEQUENCE_LENGTH - count).float())
    offset = torch.where(position < count, 0.0, torch.where(position == count, repeats, -torch.inf))
    return hidden, offset


class PaddedCrossAttention:
    """Processor of Wan's text cross-attention over a short sequence with score offsets (see the module docstring).

    `set` stores the offsets, (B, 1, 1, S), before each forward pass; all layers share them.
    """

    def __init__(self) -> None:
        self.offset: Tensor | None = None

    def set(self, offset_BS: Tensor, dtype: torch.dtype) -> None:
        """Store the offsets of the next forward pass, in the dtype of its attention."""
        # Memory-efficient attention requires rows of the mask that start at multiples of 8 elements.
        keys = offset_BS.shape[1]
        room = F.pad(offset_BS.to(dtype), (0, -keys % 8), value=-math.inf)
        self.offset = room[:, None, None, :keys]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """Return the attention output (B, N, D) of video tokens (B, N, D) over text embeddings (B, S, D)."""
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        k = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        v = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        assert self.offset is not None
        mask = self.offset.expand(-1, attn.heads, q.shape[2], -1)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask.to(v.dtype))
        out = attn.to_out[0](out.transpose(1, 2).flatten(2, 3))
        return attn.to_out[1](out)  # type: ignore[no-any-return]
