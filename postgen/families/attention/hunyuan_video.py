"""HunyuanVideo: `HunyuanVideoAttnProcessor2_0`. HunyuanVideo 1.5: `HunyuanVideo15AttnProcessor2_0`.

Video and text attend jointly, with the video tokens first. Norms are per head. The text is not rotated. In blocks with
two streams, the text has projections and norms of its own. Blocks with one stream project both together, and their
attention modules have no output layer. The processors do not use fused projections.

In 1.5, the transformer moves the valid text tokens to the front. The processor makes a mask of pairs (B, 1, N, N) from
the text mask, which takes N * N bytes per sample in every call. No later operation uses the attention output of masked
tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from postgen.families.attention.reading import (
    AttentionCall,
    Norms,
    Reading,
    Stream,
    bind,
    projected_by,
    returned,
    rope_of_pairs,
)
from postgen.families.attention.registry import AttentionAnatomy, AttentionReader


def read(call: AttentionCall) -> Reading | None:
    """Return the parts of a joint-attention call; None without text or without rotary tables."""
    text, mask = call.encoder_hidden_states, call.attention_mask
    if text is None or call.rotary is None:
        return None
    streams = _streams(call, text, call.rotary)
    return Reading(streams=streams, text=text.shape[1], mask=mask, key_lengths=_lengths(mask))


def read_15(call: AttentionCall) -> Reading | None:
    """Return the parts of a joint-attention call of 1.5; None without text, text mask or rotary tables."""
    text, mask = call.encoder_hidden_states, call.attention_mask
    if text is None or mask is None or call.rotary is None:
        return None
    tokens = call.hidden_states.shape[1] + text.shape[1]
    counts = pad(mask, (tokens - mask.shape[1], 0), value=True).bool()
    pairs = counts[:, None, None] & counts[:, None, :, None]
    return Reading(streams=_streams(call, text, call.rotary), text=text.shape[1], mask=pairs)


def _streams(call: AttentionCall, text: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Stream, ...]:
    attention, video = call.attention, call.hidden_states
    norms, rope = Norms(attention.norm_q, attention.norm_k), rope_of_pairs(rotary)
    layers = attention.to_q, attention.to_k, attention.to_v
    if attention.add_q_proj is None:
        query, key, value = projected_by(attention, layers, torch.cat([video, text], dim=1))
        return (Stream(query, key, value, norms, rope),)
    added = attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
    of_text = Norms(attention.norm_added_q, attention.norm_added_k)
    query, key, value = projected_by(attention, layers, video)
    text_query, text_key, text_value = projected_by(attention, added, text)
    return Stream(query, key, value, norms, rope), Stream(text_query, text_key, text_value, of_text)


def _lengths(mask: Tensor | None) -> Tensor | None:
    """Return the number of valid tokens of each sample, (B,); None for a mask of another kind.

    The transformer makes a bool mask (B, 1, 1, N) from the lengths of the texts: only their last tokens are masked.
    """
    if mask is None or mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        return None
    return mask.sum(dim=(1, 2, 3))


def finish(call: AttentionCall, out: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the outputs for video and text, (B, N, C) each."""
    attention: Any = call.attention
    assert call.encoder_hidden_states is not None  # `read` returns None without text
    text = call.encoder_hidden_states.shape[1]
    of_video, of_text = out[:, :-text], out[:, -text:].flatten(2, 3).to(dtype)
    if getattr(attention, "to_add_out", None) is not None:
        of_text = attention.to_add_out(of_text)
    if getattr(attention, "to_out", None) is None:
        return of_video.flatten(2, 3).to(dtype), of_text
    return returned(attention, of_video, dtype), of_text


ANATOMY = AttentionAnatomy(
    readers={
        "HunyuanVideo15AttnProcessor2_0": AttentionReader(
            bind=bind, read=read_15, finish=finish, fingerprints=("5529584fc0f40143",)
        ),
        "HunyuanVideoAttnProcessor2_0": AttentionReader(
            bind=bind, read=read, finish=finish, fingerprints=("19ce779e4c5f09e5",)
        ),
    }
)
