"""The fused form of LTX: `LTXVideoTransformerBlock` of diffusers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from postgen.families.norms import affine, plain
from postgen.fused.known import FusedBlock
from postgen.kernels.adaln.ops import gate_residual, gate_residual_norm_modulate, norm_modulate


def block_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Any:
    """Compute the same as `LTXVideoTransformerBlock.forward`, with fused norms and residuals."""
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


BLOCKS = {
    "LTXVideoTransformerBlock": FusedBlock(forward=block_forward, fingerprints=("ea91ab9f0ff3690e",)),
}
