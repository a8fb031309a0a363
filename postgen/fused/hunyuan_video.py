"""The fused forms of HunyuanVideo: the two-stream and the single-stream block of diffusers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from postgen.families.norms import plain
from postgen.fused.known import FusedBlock
from postgen.kernels.adaln.ops import gate_residual, gate_residual_norm_modulate, norm_modulate


def double_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: tuple[Tensor, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute the same as `HunyuanVideoTransformerBlock.forward`, with fused norms and residuals."""
    norms = self.norm1.norm, self.norm1_context.norm, self.norm2, self.norm2_context
    if not _replaceable(norms, self.norm1, self.norm1_context):
        stock: tuple[Tensor, Tensor] = self.postgen_stock_forward(
            hidden_states, encoder_hidden_states, temb, attention_mask, freqs_cis, *args, **kwargs
        )
        return stock
    shift, scale, gate, *of_ff = _modulation(self.norm1, temb, 6)
    text_shift, text_scale, text_gate, *of_text_ff = _modulation(self.norm1_context, temb, 6)
    out, text_out = self.attn(
        hidden_states=norm_modulate(hidden_states, scale, shift, eps=norms[0].eps),
        encoder_hidden_states=norm_modulate(encoder_hidden_states, text_scale, text_shift, eps=norms[1].eps),
        attention_mask=attention_mask,
        image_rotary_emb=freqs_cis,
    )
    shift, scale, ff_gate = of_ff
    text_shift, text_scale, text_ff_gate = of_text_ff
    hidden_states, normed = gate_residual_norm_modulate(hidden_states, out, gate, scale, shift, eps=norms[2].eps)
    encoder_hidden_states, text_normed = gate_residual_norm_modulate(
        encoder_hidden_states, text_out, text_gate, text_scale, text_shift, eps=norms[3].eps
    )
    return (
        gate_residual(hidden_states, self.ff(normed), ff_gate),
        gate_residual(encoder_hidden_states, self.ff_context(text_normed), text_ff_gate),
    )


def single_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute the same as `HunyuanVideoSingleTransformerBlock.forward`, with fused norm and residual."""
    if not _replaceable((self.norm.norm,), self.norm):
        stock: tuple[Tensor, Tensor] = self.postgen_stock_forward(
            hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb, *args, **kwargs
        )
        return stock
    text = encoder_hidden_states.shape[1]
    residual = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    shift, scale, gate = _modulation(self.norm, temb, 3)
    normed = norm_modulate(residual, scale, shift, eps=self.norm.norm.eps)
    of_mlp = self.act_mlp(self.proj_mlp(normed))
    attended = self.attn(
        hidden_states=normed[:, :-text],
        encoder_hidden_states=normed[:, -text:],
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )
    out = self.proj_out(torch.cat([torch.cat(attended, dim=1), of_mlp], dim=2))
    hidden_states = gate_residual(residual, out, gate)
    return hidden_states[:, :-text], hidden_states[:, -text:]


def _replaceable(norms: tuple[Any, ...], *zeros: Any) -> bool:
    """Return whether a fused kernel may replace these norms.

    That needs LayerNorms without weights, no hooks on them or on the modules around them (`zeros`), and no `emb`.
    """
    known = all(type(norm).__name__ == "LayerNorm" and norm.weight is None and norm.bias is None for norm in norms)
    return known and plain(*norms, *zeros) and all(getattr(zero, "emb", None) is None for zero in zeros)


def _modulation(zero: Any, temb: Tensor, parts: int) -> list[Tensor]:
    """Return shift, scale and gate of attention, then those of the feed-forward layer; each is (B, 1, C)."""
    return list(zero.linear(zero.silu(temb)).unsqueeze(1).chunk(parts, dim=2))


BLOCKS = {
    "HunyuanVideoTransformerBlock": FusedBlock(forward=double_forward, fingerprints=("eb78e62115331b99",)),
    "HunyuanVideoSingleTransformerBlock": FusedBlock(forward=single_forward, fingerprints=("64b440f9d9092128",)),
}
