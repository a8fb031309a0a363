"""CogVideoX: `CogVideoXAttnProcessor2_0`, also with fused projections, and `CogVideoXBlock` of diffusers, fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from postgen.fused.attend import attend, normed_and_rotated, of_pairs, projected, returned
from postgen.fused.config import FusedOpsConfig
from postgen.fused.known import FusedFamily, Replacement
from postgen.fused.norms import affine, plain
from postgen.kernels.adaln.ops import gate_residual, gate_residual_norm_modulate, norm_modulate


def attend_jointly(
    config: FusedOpsConfig,
    inner: Callable[..., Any],
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """Compute attention over text and video as the processor does: the text comes first and is not rotated."""
    text = encoder_hidden_states.shape[1]
    hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    batch, tokens, _ = hidden_states.shape
    if attention_mask is not None:
        attention_mask = attention.prepare_attention_mask(attention_mask, tokens, batch)
        attention_mask = attention_mask.view(batch, attention.heads, -1, attention_mask.shape[-1])
    query, key, value = projected(attention, hidden_states)
    tables = None if image_rotary_emb is None else of_pairs(image_rotary_emb)
    norms = attention.norm_q, attention.norm_k
    query, key = normed_and_rotated(config, query, key, norms, tables, first_token=text)
    out = attend(config, attention.processor, query, key, value, mask=attention_mask)
    out = returned(attention, out, query.dtype)
    return out[:, text:], out[:, :text]


def block_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what `CogVideoXBlock.forward` does."""
    zeros = self.norm1, self.norm2
    if not plain(*zeros, *(zero.norm for zero in zeros)) or any(type(z.norm).__name__ != "LayerNorm" for z in zeros):
        stock: tuple[Tensor, Tensor] = self.postgen_stock_forward(
            hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs
        )
        return stock
    shift, scale, gate, text_shift, text_scale, text_gate = _modulation(self.norm1, temb)
    of_norm = affine(self.norm1.norm)
    out, text_out = self.attn1(
        hidden_states=norm_modulate(hidden_states, scale, shift, **of_norm),
        encoder_hidden_states=norm_modulate(encoder_hidden_states, text_scale, text_shift, **of_norm),
        image_rotary_emb=image_rotary_emb,
        **(attention_kwargs or {}),
    )
    shift, scale, ff_gate, text_shift, text_scale, text_ff_gate = _modulation(self.norm2, temb)
    of_norm = affine(self.norm2.norm)
    hidden_states, normed = gate_residual_norm_modulate(hidden_states, out, gate, scale, shift, **of_norm)
    encoder_hidden_states, text_normed = gate_residual_norm_modulate(
        encoder_hidden_states, text_out, text_gate, text_scale, text_shift, **of_norm
    )
    out = self.ff(torch.cat([text_normed, normed], dim=1))
    text = encoder_hidden_states.shape[1]
    return (
        gate_residual(hidden_states, out[:, text:], ff_gate),
        gate_residual(encoder_hidden_states, out[:, :text], text_ff_gate),
    )


def _modulation(zero: Any, temb: Tensor) -> list[Tensor]:
    """Six of (B, 1, C): shift, scale and gate of the video, then of the text."""
    return list(zero.linear(zero.silu(temb)).unsqueeze(1).chunk(6, dim=2))


FAMILY = FusedFamily(
    processors={
        "CogVideoXAttnProcessor2_0": Replacement(fused=attend_jointly, fingerprints=("3099cf1cf662f915",)),
        "FusedCogVideoXAttnProcessor2_0": Replacement(fused=attend_jointly, fingerprints=("30074dce7fc5ce85",)),
    },
    blocks={"CogVideoXBlock": Replacement(fused=block_forward, fingerprints=("afd68416e3cc8057",))},
)
