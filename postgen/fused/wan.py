"""The fused form of Wan: `WanTransformerBlock` of diffusers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from postgen.families.norms import affine, plain
from postgen.fused.known import FusedBlock
from postgen.kernels.adaln.ops import gate_residual, gate_residual_norm_modulate, norm_modulate


def block_forward(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
) -> Any:
    """Compute the same as `WanTransformerBlock.forward`, with fused norms and residuals."""
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
    """Return six float32 tensors: (B, 1, C), or (B, N, C) where every token has its own timestep."""
    if temb.ndim == 4:
        return [each.squeeze(2) for each in (table.unsqueeze(0) + temb.float()).chunk(6, dim=2)]
    return list((table + temb.float()).chunk(6, dim=1))


BLOCKS = {
    "WanTransformerBlock": FusedBlock(forward=block_forward, fingerprints=("44ecb859c80020cf",)),
}
