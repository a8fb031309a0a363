"""The fused form of CogVideoX: `CogVideoXBlock` of diffusers."""

from __future__ import annotations

from typing import Any

import torch
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
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the same as `CogVideoXBlock.forward`, with fused norms and residuals."""
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
    """Return six tensors (B, 1, C): shift, scale and gate of the video, then of the text."""
    return list(zero.linear(zero.silu(temb)).unsqueeze(1).chunk(6, dim=2))


BLOCKS = {
    "CogVideoXBlock": FusedBlock(forward=block_forward, fingerprints=("afd68416e3cc8057",)),
}
