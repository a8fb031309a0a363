"""Wan: `WanAttnProcessor` and `WanTransformerBlock` of diffusers, fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from postgen.fused.attend import attend, normed_and_rotated, projected, returned
from postgen.fused.config import FusedOpsConfig
from postgen.fused.known import FusedFamily, Replacement
from postgen.fused.norms import affine, plain
from postgen.kernels.adaln.ops import gate_residual, gate_residual_norm_modulate, norm_modulate


def attend_self(
    config: FusedOpsConfig,
    inner: Callable[..., Any],
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """Compute self-attention over the video as the processor does."""
    if encoder_hidden_states is not None or rotary_emb is None:
        return inner(attention, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
    query, key, value = projected(attention, hidden_states)
    cos, sin = rotary_emb  # (1, N, 1, D), every angle twice
    norms = attention.norm_q, attention.norm_k
    query, key = normed_and_rotated(config, query, key, norms, (cos[..., ::2], sin[..., ::2]), across_heads=True)
    out = attend(config, attention.processor, query, key, value, mask=attention_mask)
    return returned(attention, out, query.dtype)


def block_forward(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
) -> Any:
    """Do what `WanTransformerBlock.forward` does."""
    cross_norm = type(self.norm2).__name__
    if cross_norm not in ("FP32LayerNorm", "Identity") or not plain(self.norm1, self.norm2, self.norm3):
        return self.postgen_stock_forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = _modulation(self.scale_shift_table, temb)
    normed = norm_modulate(hidden_states, scale, shift, eps=self.norm1.eps)
    out = self.attn1(normed, None, None, rotary_emb)
    if cross_norm == "FP32LayerNorm":
        hidden_states, normed = gate_residual_norm_modulate(hidden_states, out, gate, **affine(self.norm2))
    else:
        normed = hidden_states = gate_residual(hidden_states, out, gate)
    out = self.attn2(normed, encoder_hidden_states, None, None)
    hidden_states, normed = gate_residual_norm_modulate(
        hidden_states, out, None, ff_scale, ff_shift, eps=self.norm3.eps
    )
    return gate_residual(hidden_states, self.ffn(normed), ff_gate)


def _modulation(table: Tensor, temb: Tensor) -> list[Tensor]:
    """Six of (B, 1, C), or of (B, N, C) where every token has a timestep of its own, float32."""
    if temb.ndim == 4:
        return [each.squeeze(2) for each in (table.unsqueeze(0) + temb.float()).chunk(6, dim=2)]
    return list((table + temb.float()).chunk(6, dim=1))


FAMILY = FusedFamily(
    processors={"WanAttnProcessor": Replacement(fused=attend_self, fingerprints=("a2e019b02dcb5331",))},
    blocks={"WanTransformerBlock": Replacement(fused=block_forward, fingerprints=("44ecb859c80020cf",))},
)
