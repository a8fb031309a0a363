"""Stable Diffusion 3 and 3.5: `JointAttnProcessor2_0`. Picture, then text, attend jointly; nothing is rotated.

Norms are per head, and 3.0 has none. The text has projections and norms of its own, and no output layer in the last
block, which returns none of it. The second attention of 3.5's dual blocks is over the picture alone. The processor
takes a mask and does nothing with it. That of fused projections leaves the norms out, and is not read.
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
    """Take the arguments of the processor."""
    return AttentionCall(attention, hidden_states, encoder_hidden_states, attention_mask)


def read(call: AttentionCall) -> Reading:
    """Read joint attention, and without text attention among the picture."""
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
    """Return picture and text, (B, N, C) each; the picture alone where it attends alone."""
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
