"""FLUX.1 and Chroma: `FluxAttnProcessor`, also with fused projections.

Text and picture attend jointly, with the text tokens first. Norms are per head. All tokens are rotated; the angles of
the text are zero. In double blocks, the text has projections and norms of its own. A single block passes text and
picture as one sequence, without the number of text tokens. Its attention module has no output layer, because the block
projects the outputs of attention and feed-forward with one layer. The mask of Chroma marks the valid pairs of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postgen.families.attention.reading import (
    AttentionCall,
    Norms,
    Reading,
    Stream,
    bind,
    projected,
    projected_at_once,
    projected_by,
    returned,
    rope_of_pairs,
)
from postgen.families.attention.registry import AttentionAnatomy, AttentionReader


def read(call: AttentionCall) -> Reading | None:
    """Return the parts of a joint-attention call.

    None without rotary tables, without text in a double block, or with text in a single block.
    """
    attention, text, rotary = call.attention, call.encoder_hidden_states, call.rotary
    if rotary is None or (text is None) != (attention.added_kv_proj_dim is None):
        return None
    norms = Norms(attention.norm_q, attention.norm_k)
    query, key, value = projected(attention, call.hidden_states)
    if text is None:
        stream = Stream(query, key, value, norms, rope_of_pairs(rotary))
        return Reading(streams=(stream,), text_first=True, text_told=False, mask=call.attention_mask)
    count = text.shape[1]
    cos, sin = rotary
    picture = Stream(query, key, value, norms, rope_of_pairs((cos[count:], sin[count:])))
    text_norms = Norms(attention.norm_added_q, attention.norm_added_k)
    query, key, value = _projected_text(attention, text)
    told = Stream(query, key, value, text_norms, rope_of_pairs((cos[:count], sin[:count])))
    return Reading(streams=(told, picture), text=count, text_first=True, mask=call.attention_mask)


def _projected_text(attention: Any, text: Tensor) -> list[Tensor]:
    if attention.fused_projections and hasattr(attention, "to_added_qkv"):
        return projected_at_once(attention, attention.to_added_qkv, text)
    return projected_by(attention, (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj), text)


def finish(call: AttentionCall, out: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | Tensor:
    """Return the outputs for picture and text, (B, N, C) each; for a single block, one sequence of both."""
    if call.encoder_hidden_states is None:
        return out.flatten(2, 3).to(dtype)
    text = call.encoder_hidden_states.shape[1]
    of_text: Tensor = call.attention.to_add_out(out[:, :text].flatten(2, 3).to(dtype).contiguous())
    return returned(call.attention, out[:, text:].contiguous(), dtype), of_text


ANATOMY = AttentionAnatomy(
    readers={
        "FluxAttnProcessor": AttentionReader(bind=bind, read=read, finish=finish, fingerprints=("bc0b17f61cde03f5",))
    }
)
