"""DiT and PixArt: `AttnProcessor2_0`, and `FusedAttnProcessor2_0` for fused projections.

The picture attends to itself. The class of DiT enters through the modulation. The text of PixArt enters through
cross-attention (with a mask), which is not read. Queries and keys have no norms and no rotation. The two processors
also serve other models, in which the attention modules do more than project and attend. Calls of such modules have no
reading, so the processor computes them.
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
    prepared_mask,
    projected_at_once,
    projected_by,
    returned,
)
from postgen.families.attention.registry import AttentionAnatomy, AttentionReader


def bind(
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    temb: Tensor | None = None,
) -> AttentionCall:
    """Return the arguments of the processor by name, without `temb`, which only a spatial norm uses."""
    return AttentionCall(attention, hidden_states, encoder_hidden_states, attention_mask)


def read(call: AttentionCall) -> Reading | None:
    """Return the parts of a self-attention call.

    None for cross-attention, feature maps, and modules that do more than project.
    """
    attention, picture = call.attention, call.hidden_states
    if _is_more(call):
        return None
    return _reading(call, projected_by(attention, (attention.to_q, attention.to_k, attention.to_v), picture))


def read_fused(call: AttentionCall) -> Reading | None:
    """Return the parts of a self-attention call, with one fused projection."""
    if _is_more(call):
        return None
    return _reading(call, projected_at_once(call.attention, call.attention.to_qkv, call.hidden_states))


def _is_more(call: AttentionCall) -> bool:
    attention = call.attention
    cross = call.encoder_hidden_states is not None
    norms = attention.spatial_norm is not None or attention.group_norm is not None
    return cross or norms or attention.residual_connection or call.hidden_states.dim() != 3


def _reading(call: AttentionCall, made: list[Tensor]) -> Reading:
    attention, (query, key, value) = call.attention, made
    batch, tokens, _ = call.hidden_states.shape
    stream = Stream(query, key, value, Norms(attention.norm_q, attention.norm_k))
    return Reading(streams=(stream,), mask=prepared_mask(attention, call.attention_mask, batch, tokens))


def finish(call: AttentionCall, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the output for the picture, (B, N, C)."""
    scaled: Tensor = returned(call.attention, out, dtype) / call.attention.rescale_output_factor
    return scaled


ANATOMY = AttentionAnatomy(
    readers={
        "AttnProcessor2_0": AttentionReader(bind=bind, read=read, finish=finish, fingerprints=("3653e68140893452",)),
        "FusedAttnProcessor2_0": AttentionReader(
            bind=bind, read=read_fused, finish=finish, fingerprints=("f5d2ac6afd9951d3",)
        ),
    }
)
