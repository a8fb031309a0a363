"""Stable Diffusion 3 and 3.5: `JointAttnProcessor2_0`.

Picture and text attend jointly, with the picture tokens first. There is no rotation. Norms are per head; 3.0 has none.
The text has projections and norms of its own. In the last block, which returns no text, the text has no output layer.
The second attention of the dual blocks of 3.5 is over the picture only. The processor accepts a mask and ignores it.
The processor for fused projections skips the norms; it has no reader here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postgen.families.attention.reading import AttentionCall, Norms, Reading, Stream, projected_by, returned
from postgen.families.attention.registry import AttentionAnatomy, AttentionReader


def bind(
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> AttentionCall:
    """Return the arguments of the processor by name."""
    return AttentionCall(attention, hidden_states, encoder_hidden_states, attention_mask)


def read(call: AttentionCall) -> Reading:
    """Return the parts of a joint-attention call, or without text of a self-attention call of the picture."""
    attention, text = call.attention, call.encoder_hidden_states
    layers = attention.to_q, attention.to_k, attention.to_v
    query, key, value = projected_by(attention, layers, call.hidden_states)
    picture = Stream(query, key, value, Norms(attention.norm_q, attention.norm_k))
    if text is None:
        return Reading(streams=(picture,))
    added = attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
    query, key, value = projected_by(attention, added, text)
    told = Stream(query, key, value, Norms(attention.norm_added_q, attention.norm_added_k))
    return Reading(streams=(picture, told), text=text.shape[1])


def finish(call: AttentionCall, out: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | Tensor:
    """Return the outputs for picture and text, (B, N, C) each; without text, only that of the picture."""
    if call.encoder_hidden_states is None:
        return returned(call.attention, out, dtype)
    tokens = call.hidden_states.shape[1]
    of_text = out[:, tokens:].flatten(2, 3).to(dtype)
    if not call.attention.context_pre_only:
        of_text = call.attention.to_add_out(of_text)
    return returned(call.attention, out[:, :tokens], dtype), of_text


ANATOMY = AttentionAnatomy(
    readers={
        "JointAttnProcessor2_0": AttentionReader(
            bind=bind, read=read, finish=finish, fingerprints=("e2feada452626a97",)
        )
    }
)
