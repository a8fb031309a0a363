"""LTX: `LTXVideoAttnProcessor` and `LTXVideoTransformerBlock` of diffusers, fused."""

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
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> Any:
    """Compute self-attention over the video as the processor does."""
    if encoder_hidden_states is not None or attention_mask is not None or image_rotary_emb is None:
        return inner(attention, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
    query, key, value = projected(attention, hidden_states)
    # (B, N, H * D): every head has angles of its own, each of them twice.
    cos, sin = (table.unflatten(-1, (attention.heads, -1))[..., ::2] for table in image_rotary_emb)
    norms = attention.norm_q, attention.norm_k
    query, key = normed_and_rotated(config, query, key, norms, (cos, sin), across_heads=True)
    out = attend(config, attention.processor, query, key, value)
    return returned(attention, out, query.dtype)


def block_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Any:
    """Do what `LTXVideoTransformerBlock.forward` does."""
    if not plain(self.norm1, self.norm2) or type(self.norm1).__name__ != "RMSNorm":
        return self.postgen_stock_forward(
            hidden_states, encoder_hidden_states, temb, image_rotary_emb, encoder_attention_mask
        )
    table = self.scale_shift_table
    values = table[None, None].to(temb.device) + temb.unflatten(2, (table.shape[0], -1))
    shift, scale, gate, ff_shift, ff_scale, ff_gate = values.unbind(dim=2)
    normed = norm_modulate(hidden_states, scale, shift, **affine(self.norm1), rms=True)
    out = self.attn1(hidden_states=normed, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb)
    hidden_states = gate_residual(hidden_states, out, gate)
    out = self.attn2(
        hidden_states,
        encoder_hidden_states=encoder_hidden_states,
        image_rotary_emb=None,
        attention_mask=encoder_attention_mask,
    )
    hidden_states, normed = gate_residual_norm_modulate(
        hidden_states, out, None, ff_scale, ff_shift, **affine(self.norm2), rms=True
    )
    return gate_residual(hidden_states, self.ff(normed), ff_gate)


FAMILY = FusedFamily(
    processors={"LTXVideoAttnProcessor": Replacement(fused=attend_self, fingerprints=("a0f89447f54311c2",))},
    blocks={"LTXVideoTransformerBlock": Replacement(fused=block_forward, fingerprints=("ea91ab9f0ff3690e",))},
)
