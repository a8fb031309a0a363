"""What is read of an attention call, the same for every architecture; shapes are (B, N, H, D)."""

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
    """A call of an attention processor, by the names that most of them use."""

    attention: Any
    """The module."""
    hidden_states: Tensor
    """(B, N, C), the video or picture; in single blocks of FLUX the text before it."""
    encoder_hidden_states: Tensor | None = None
    """(B, L, C), the text, where both attend jointly; for cross-attention what is attended to."""
    attention_mask: Tensor | None = None
    """As the transformer gives it."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines as the transformer gives them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormValues:
    """What the norms of queries and keys compute, as `postgen.kernels.qk_norm_rope` names it."""

    norm: str
    """none, rms_norm, rms_norm_across_heads or layer_norm."""
    eps: float = 1e-6
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Norms:
    """The norms of queries and keys."""

    query: Any
    """Module, None for no norm."""
    key: Any
    """As `query`."""
    across_heads: bool = False
    """Whether they take all heads of a token together, (B, N, H * D)."""

    def called(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Call the modules, as diffusers does."""
        return self._called(self.query, query), self.called_on_keys(key)

    def called_on_keys(self, key: Tensor) -> Tensor:
        """Call the module of the keys alone."""
        return self._called(self.key, key)

    def _called(self, norm: Any, x: Tensor) -> Tensor:
        if norm is None:
            return x
        out: Tensor = norm(x.flatten(2)).view_as(x) if self.across_heads else norm(x)
        return out

    def values(self) -> NormValues | None:
        """Return what the modules compute; None: it is not known, or somebody watches them, so they must be called."""
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
    """A rotation (arXiv:2104.09864, eq. 34) of the channel pairs (2i, 2i + 1); one contract for every architecture."""

    cos: Tensor
    """(1 or B, R, 1 or H, D / 2): R tokens are rotated, the others stay."""
    sin: Tensor
    """As `cos`."""
    first_token: int = 0
    """The first of the tokens that are rotated."""
    in_float32: bool = True
    """Whether diffusers rotates in float32; otherwise in the wider dtype of channels and tables. Rounded once."""

    def rotated(self, x: Tensor) -> Tensor:
        """Rotate queries or keys (B, N, H, D) with diffusers' own roundings."""
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
    """Tokens that are projected and normed by the same modules."""

    query: Tensor
    """(B, N, H, D), as projected; a view of a fused projection is not contiguous."""
    key: Tensor
    value: Tensor
    norms: Norms
    rope: Rope | None = None
    """None rotates nothing."""

    def normed_and_rotated(self) -> tuple[Tensor, Tensor]:
        """Return queries and keys as attention reads them, bit by bit those of diffusers' processor."""
        query, key = self.norms.called(self.query, self.key)
        if self.rope is not None:
            query, key = self.rope.rotated(query), self.rope.rotated(key)
        return query, key

    def for_one_kernel(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return queries and keys, and what is left to do with them as `postgen.kernels.qk_norm_rope` takes it.

        Norms that cannot be left out are called. Nothing left is an empty dict.
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
    """What a call of self-attention is made of. Attention is over the tokens of all streams, one after the other."""

    streams: tuple[Stream, ...]
    """One, or two where the text has projections and norms of its own."""
    text: int = 0
    """Tokens of text among them."""
    text_first: bool = False
    """Whether the text stands before the video, else behind it."""
    text_told: bool = True
    """Whether `text` is known. A single block of FLUX is given text and picture as one sequence, and not told how many
    tokens of it are text: `text` is 0 then. `with_video` puts it right."""
    mask: Tensor | None = None
    """Bool (True counts) or added to the logits, as torch's attention takes it: (B, 1 or H, 1 or N, N)."""
    key_lengths: Tensor | None = None
    """(B,): how many of the first keys count, where that is all that the mask says. None with a mask: it says more."""

    @property
    def video(self) -> slice:
        """The video's tokens on the axis N."""
        return slice(self.text, None) if self.text_first else slice(None, -self.text or None)

    def with_video(self, tokens: int) -> Reading:
        """Return the reading with as much text as is left beside so many tokens of the video, as its grid has them.

        Raises:
            UserError: the call has another number of tokens than that and its text.
        """
        found = sum(stream.key.shape[1] for stream in self.streams)
        text = self.text if self.text_told else found - tokens
        if text < 0 or found != tokens + text:
            raise UserError(
                f"attention was given {found} tokens, {self.text} of them text, for a grid of {tokens}: take the grid"
                " of the same call"
            )
        return replace(self, text=text, text_told=True)

    def joined(
        self, prepare: Callable[[Stream], tuple[Tensor, Tensor]] = Stream.normed_and_rotated
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of all tokens, (B, N, H, D).

        Args:
            prepare: returns the normed and rotated queries and keys of a stream; as diffusers does by default.
        """
        parts = [(*prepare(stream), stream.value) for stream in self.streams]
        if len(parts) == 1:
            return parts[0]
        query, key, value = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return query, key, value


def dispatched(attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return attention as diffusers computes it, with the backend and the split among ranks that the module was given.

    Args:
        attention: the module.
        query: (B, N, H, D), normed and rotated.
        key: as `query`.
        value: as `query`.
        mask: as `Reading.mask`.
    """
    backend, parallel = attention_settings(attention.processor)
    out: Tensor = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend, parallel_config=parallel)
    return out


def projected(attention: Any, hidden_states: Tensor) -> list[Tensor]:
    """Return queries, keys and values (B, N, H, D) of self-attention, fused QKV projections included, as views."""
    if getattr(attention, "fused_projections", False):
        return projected_at_once(attention, attention.to_qkv, hidden_states)
    return projected_by(attention, (attention.to_q, attention.to_k, attention.to_v), hidden_states)


def projected_by(attention: Any, layers: tuple[Any, ...], hidden_states: Tensor) -> list[Tensor]:
    """Return what each of some linear layers of an attention module makes, (B, N, H, D)."""
    return [layer(hidden_states).unflatten(2, (attention.heads, -1)) for layer in layers]


def projected_at_once(attention: Any, layer: Any, hidden_states: Tensor) -> list[Tensor]:
    """Return queries, keys and values (B, N, H, D) that one linear layer makes, as views."""
    return [part.unflatten(2, (attention.heads, -1)) for part in layer(hidden_states).chunk(3, dim=-1)]


def prepared_mask(attention: Any, mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """Return a mask (B, H, 1 or N, N) as the processors of `diffusers.models.attention_processor` prepare it."""
    if mask is None:
        return None
    prepared: Tensor = attention.prepare_attention_mask(mask, tokens, batch)
    return prepared.view(batch, attention.heads, -1, prepared.shape[-1])


def returned(attention: Any, out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what attention found, (B, N, H, D), through its last projection, (B, N, C)."""
    out = out.flatten(2, 3).to(dtype)
    for layer in attention.to_out:
        out = layer(out)
    return out


def rope_of_pairs(rotary: tuple[Tensor, Tensor], first_token: int = 0) -> Rope:
    """Read tables (R, D) in which every angle stands twice in a row, as `apply_rotary_emb` of diffusers takes them."""
    cos, sin = (table[None, :, None, ::2] for table in rotary)
    return Rope(cos, sin, first_token)


def bind(
    attention: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> AttentionCall:
    """Take the arguments of most processors."""
    return AttentionCall(attention, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
