"""The parts of an attention call, in one form for every architecture.

In shapes, B is the batch, N the number of tokens, H the number of heads, D the channels per head, and C = H * D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from postgen.compat.attention import attention_settings
from postgen.errors import UserError
from postgen.families.norms import affine, plain


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The arguments of an attention processor, under the names that most processors use."""

    attention: Any
    """The attention module."""
    hidden_states: Tensor
    """(B, N, C), the video or picture; in single blocks of FLUX, the text tokens come first in the same sequence."""
    encoder_hidden_states: Tensor | None = None
    """(B, L, C), the text in joint attention; in cross-attention, the sequence for keys and values."""
    attention_mask: Tensor | None = None
    """The mask, as the transformer passes it."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines, as the transformer passes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormValues:
    """Kind and parameters of the norms of queries and keys, with the names of `postgen.kernels.qk_norm_rope`."""

    norm: str
    """Kind of norm: "none", "rms_norm", "rms_norm_across_heads" or "layer_norm"."""
    eps: float = 1e-6
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Norms:
    """The norm modules of queries and keys."""

    query: Any
    """Norm module of the queries; None for no norm."""
    key: Any
    """Norm module of the keys; None for no norm."""
    across_heads: bool = False
    """Whether the norms take all heads of a token together, (B, N, H * D)."""

    def called(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normed queries and keys, from calls of the modules as in diffusers."""
        return self._called(self.query, query), self.called_on_keys(key)

    def called_on_keys(self, key: Tensor) -> Tensor:
        """Return the normed keys, from a call of their module."""
        return self._called(self.key, key)

    def _called(self, norm: Any, x: Tensor) -> Tensor:
        if norm is None:
            return x
        out: Tensor = norm(x.flatten(2)).view_as(x) if self.across_heads else norm(x)
        return out

    def values(self) -> NormValues | None:
        """Return kind and parameters of the norms.

        None means that the modules must be called: their kinds are unknown or differ, or they have hooks.
        """
        query, key = self.query, self.key
        if query is None and key is None:
            return NormValues(norm="none")
        if query is None or key is None or not plain(query, key):
            return None
        kind = type(query).__name__
        if kind != type(key).__name__ or query.eps is None or query.eps != key.eps:
            return None
        if kind not in ("RMSNorm", "LayerNorm") or (self.across_heads and kind != "RMSNorm"):
            return None
        norm = "layer_norm" if kind == "LayerNorm" else "rms_norm_across_heads" if self.across_heads else "rms_norm"
        of_query, of_key = affine(query), affine(key)
        return NormValues(
            norm=norm,
            eps=query.eps,
            q_weight=of_query["weight"],
            k_weight=of_key["weight"],
            q_bias=of_query["bias"],
            k_bias=of_key["bias"],
        )


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotation (arXiv:2104.09864, eq. 34) of the channel pairs (2i, 2i + 1), in one form for every architecture."""

    cos: Tensor
    """Cosines, (1 or B, R, 1 or H, D / 2): R consecutive tokens are rotated, the others do not change."""
    sin: Tensor
    """Sines, with the shape of `cos`."""
    first_token: int = 0
    """Index of the first rotated token."""
    in_float32: bool = True
    """True if diffusers rotates in float32, False if in the wider dtype of input and tables. Both round once."""

    def rotated(self, x: Tensor) -> Tensor:
        """Rotate queries or keys (B, N, H, D), with the same rounding as in diffusers."""
        first, last = self.first_token, self.first_token + self.cos.shape[1]
        a, b = x[:, first:last].unflatten(-1, (-1, 2)).unbind(-1)
        if self.in_float32:
            a, b = a.float(), b.float()
        turned = torch.stack([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1).flatten(-2).to(x.dtype)
        if turned.shape == x.shape:
            return turned
        return torch.cat([x[:, :first], turned, x[:, last:]], dim=1)


@dataclass(frozen=True, slots=True)
class Stream:
    """Tokens that share their projection and norm modules."""

    query: Tensor
    """Projected queries (B, N, H, D), before norm and rotation; not contiguous after a fused projection."""
    key: Tensor
    """Projected keys, like `query`."""
    value: Tensor
    """Projected values, like `query`."""
    norms: Norms
    """The norms of queries and keys."""
    rope: Rope | None = None
    """The rotation; None for no rotation."""

    def normed_and_rotated(self) -> tuple[Tensor, Tensor]:
        """Return the queries and keys for attention, with the same bits as in the processor of diffusers."""
        query, key = self.norms.called(self.query, self.key)
        if self.rope is not None:
            query, key = self.rope.rotated(query), self.rope.rotated(key)
        return query, key

    def for_one_kernel(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return queries, keys, and the remaining norm and rotation as arguments of `postgen.kernels.qk_norm_rope`.

        Norm modules that must be called are called here, and the remaining norm is then "none". The arguments are
        empty if neither norm nor rotation remains.
        """
        query, key, values = self.query, self.key, self.norms.values()
        if values is None:
            query, key = self.norms.called(query, key)
            values = NormValues(norm="none")
        if self.rope is None and values.norm == "none":
            return query, key, {}
        left: dict[str, Any] = {
            "norm": values.norm,
            "eps": values.eps,
            "q_weight": values.q_weight,
            "k_weight": values.k_weight,
            "q_bias": values.q_bias,
            "k_bias": values.k_bias,
        }
        if self.rope is not None:
            left |= {"cos": self.rope.cos, "sin": self.rope.sin, "first_token": self.rope.first_token}
        return query, key, left


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The parts of a call of self-attention. Attention is over the concatenated tokens of all streams."""

    streams: tuple[Stream, ...]
    """One stream, or two if the text has projections and norms of its own."""
    text: int = 0
    """Number of text tokens."""
    text_first: bool = False
    """True if the text tokens come before the video tokens, False if they come after."""
    text_told: bool = True
    """Whether `text` is known. A single block of FLUX receives text and picture as one sequence, without the number of
    text tokens. Then `text` is 0, and `with_video` corrects it."""
    mask: Tensor | None = None
    """Mask as torch's attention takes it: bool (True: attend) or added to the logits, (B, 1 or H, 1 or N, N)."""
    key_lengths: Tensor | None = None
    """Number of valid keys at the start of each sample, (B,), if this is equivalent to `mask`; otherwise None."""

    @property
    def video(self) -> slice:
        """Slice of the video tokens on the axis N."""
        return slice(self.text, None) if self.text_first else slice(None, -self.text or None)

    def with_video(self, tokens: int) -> Reading:
        """Return the reading with the number of text tokens that remain for a number of video tokens.

        Args:
            tokens: number of tokens of the video grid.

        Raises:
            UserError: the call does not have `tokens` video tokens.
        """
        found = sum(stream.key.shape[1] for stream in self.streams)
        text = self.text if self.text_told else found - tokens
        if text < 0 or found != tokens + text:
            raise UserError(
                f"attention received {found} tokens, {self.text} of them text, for a grid of {tokens}: use the grid"
                " of the same call"
            )
        return replace(self, text=text, text_told=True)

    def joined(
        self, prepare: Callable[[Stream], tuple[Tensor, Tensor]] = Stream.normed_and_rotated
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of all tokens, (B, N, H, D).

        Args:
            prepare: returns the normed and rotated queries and keys of a stream; by default as in diffusers.
        """
        parts = [(*prepare(stream), stream.value) for stream in self.streams]
        if len(parts) == 1:
            return parts[0]
        query, key, value = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return query, key, value


def dispatched(attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return attention as diffusers computes it, with the backend and the context parallelism of the module.

    Args:
        attention: the attention module.
        query: normed and rotated queries (B, N, H, D).
        key: normed and rotated keys (B, N, H, D).
        value: values (B, N, H, D).
        mask: mask as in `Reading.mask`.

    Returns:
        The attention output (B, N, H, D).
    """
    backend, parallel = attention_settings(attention.processor)
    out: Tensor = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend, parallel_config=parallel)
    return out


def projected(attention: Any, hidden_states: Tensor) -> list[Tensor]:
    """Return queries, keys and values (B, N, H, D) of self-attention; those of a fused projection are views."""
    if getattr(attention, "fused_projections", False):
        return projected_at_once(attention, attention.to_qkv, hidden_states)
    return projected_by(attention, (attention.to_q, attention.to_k, attention.to_v), hidden_states)


def projected_by(attention: Any, layers: tuple[Any, ...], hidden_states: Tensor) -> list[Tensor]:
    """Return the outputs of linear layers of an attention module, (B, N, H, D) each."""
    return [layer(hidden_states).unflatten(2, (attention.heads, -1)) for layer in layers]


def projected_at_once(attention: Any, layer: Any, hidden_states: Tensor) -> list[Tensor]:
    """Return queries, keys and values (B, N, H, D) from one fused linear layer, as views."""
    return [part.unflatten(2, (attention.heads, -1)) for part in layer(hidden_states).chunk(3, dim=-1)]


def prepared_mask(attention: Any, mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """Return the mask (B, H, 1 or N, N) that the processors of `diffusers.models.attention_processor` use."""
    if mask is None:
        return None
    prepared: Tensor = attention.prepare_attention_mask(mask, tokens, batch)
    return prepared.view(batch, attention.heads, -1, prepared.shape[-1])


def returned(attention: Any, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply the output projection of an attention module: (B, N, H, D) -> (B, N, C)."""
    out = out.flatten(2, 3).to(dtype)
    for layer in attention.to_out:
        out = layer(out)
    return out


def rope_of_pairs(rotary: tuple[Tensor, Tensor], first_token: int = 0) -> Rope:
    """Convert tables (R, D) for `apply_rotary_emb` of diffusers, in which every angle appears twice in a row."""
    cos, sin = (table[None, :, None, ::2] for table in rotary)
    return Rope(cos, sin, first_token)


def bind(
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> AttentionCall:
    """Return the arguments of a processor by name; the signature is that of most processors."""
    return AttentionCall(attention, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
