"""`lit`: linear attention with one state for the whole clip, plus a convolution of the values (arXiv:2501.12976).

With q = phi(norm(Q)), k = phi(norm(K) - mean), the rotary embedding R and the values v:

    S = sum_j R_j k_j v_j^T,  k' = sum_j k_j,  y_i = (R_i q_i)^T S / (q_i . k' + eps) + conv(v)_i

If all features of a query are zero, only the convolution remains. Text keys stay exact: the softmax over the text and
the linear sum over the video share one divisor. In the causal form S and k' sum over the frames up to and including
the frame of the query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.kernels.attention.ops import attention
from postgen.kernels.linear_attention.ops import linear_attention_with_state
from postgen.lit.features import (
    GridConvolution,
    exact,
    feature,
    joined,
    linear_parts,
    merged,
    no_autocast,
    rotate_both,
)
from postgen.lit.layers.base import LitLayer, Shape, State, softmax_flops
from postgen.lit.tables import SeparableRope

if TYPE_CHECKING:
    from postgen.families import Grid
    from postgen.lit.options import LitOptions
    from postgen.lit.tokens import Tokens


class Lit(LitLayer):
    """The layer type `lit`: linear attention with one state for the whole clip."""

    kind = "lit"

    def __init__(self, shape: Shape, options: LitOptions) -> None:
        super().__init__(shape)
        if shape.heads % options.merge_heads:
            raise UserError(f"merge_heads={options.merge_heads} does not divide {shape.heads} heads")
        self.options = options
        self.conv = GridConvolution(
            shape.heads * shape.channels,
            options.conv_space,
            options.conv_time,
            causal=options.causal,
            init=options.conv_init,
        )
        self._separable = SeparableRope()

    def forward(self, tokens: Tokens) -> Tensor:
        """Return the outputs of the video tokens, (B, N, H, D)."""
        query, key, value = self._prepared(tokens)
        text = tokens.text_keys()
        if self.options.causal:
            return self.stream(tokens, None)[0]
        table = self._separable.table(tokens.rope, tokens.grid, self.options.merge_heads)
        if tokens.rope is None or table is not None:
            # The fused operation also divides and convolves. With text the divisor must cover the text too, so the
            # division is undone below and repeated over both.
            conv = (None, None) if text is not None else self.conv.weights()
            out, _, key_sum = linear_attention_with_state(
                query,
                key,
                value,
                feature_map=self.options.feature_map,
                eps=self.options.eps,
                grid=(tokens.grid.frames, tokens.grid.height, tokens.grid.width),
                rope=None if table is None else table[0],
                rope_pairs=None if table is None else table[1],
                conv_space=conv[0],
                conv_time=conv[1],
            )
            if text is None:
                return out.reshape(tokens.value.shape)
            features = feature(exact(query), self.options.feature_map)
            with no_autocast(features):
                divisor = torch.einsum("bnhd,bhd->bnh", features, key_sum) + self.options.eps
            numerator = exact(out) * divisor[..., None]
        else:
            q, k = (feature(exact(x), self.options.feature_map) for x in (query, key))
            numerator, divisor = linear_parts(q, k, exact(value), tokens.rope)
        return self._finished(tokens, numerator, divisor, self.conv.in_time(tokens.value, tokens.grid))

    def stream(self, tokens: Tokens, state: State | None) -> tuple[Tensor, State]:
        """Compute the next frames of a stream; see `LitLayer.stream`.

        The state holds S, k' and the values of the last frames, which the convolution along time reads.
        """
        if not self.options.causal:
            return super().stream(tokens, state)
        query, key, value = self._prepared(tokens)
        grid, rope = tokens.grid, tokens.rope
        q, k = (feature(exact(x), self.options.feature_map) for x in (query, key))
        v = exact(value)
        by_frame = [x.unflatten(1, (grid.frames, -1)) for x in (*rotate_both(q, k, rope), q, k, v)]
        with no_autocast(v):
            sums = torch.einsum("bfshd,bfshe->bfhde", by_frame[1], by_frame[4]).cumsum(dim=1)
            key_sums = by_frame[3].sum(dim=2).cumsum(dim=1)
            if state is not None:
                sums, key_sums = sums + state["sum"][:, None], key_sums + state["key_sum"][:, None]
            numerator = torch.einsum("bfshd,bfhde->bfshe", by_frame[0], sums).flatten(1, 2)
            divisor = torch.einsum("bfshd,bfhd->bfsh", by_frame[2], key_sums).flatten(1, 2)
        last = self._before(tokens, state)
        whole = tokens.value if last is None else torch.cat([last, tokens.value], dim=1)
        kept = {"sum": sums[:, -1], "key_sum": key_sums[:, -1]}
        if last is not None:
            kept["last"] = whole[:, whole.shape[1] - last.shape[1] :]
        return self._finished(tokens, numerator, divisor, self.conv.in_time(tokens.value, grid, last)), kept

    def flops(self, grid: Grid, text: int) -> int:
        """Return the FLOPs of one call with one sample."""
        shape, merge = self.shape, self.options.merge_heads
        products = grid.tokens * shape.heads * shape.channels * (4 * shape.channels * merge + 2)
        taps = sum(weight[0].numel() for weight in self.conv.parameters())
        return (
            products
            + 2 * grid.tokens * shape.heads * shape.channels * taps
            + softmax_flops(grid.tokens, text, shape)
            + softmax_flops(text, grid.tokens + text, shape)
        )

    def _prepared(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values before the feature map, with merged heads."""
        query, key = tokens.centered() if self.options.center_keys else tokens.normed()
        query, key, value = (merged(x, self.options.merge_heads) for x in (query, key, tokens.value))
        return query, key, value

    def _finished(self, tokens: Tokens, numerator: Tensor, divisor: Tensor, in_time: Tensor) -> Tensor:
        """Divide, together with the softmax over the text if there is text, and add the convolution."""
        value, text = tokens.value, tokens.text_keys()
        numerator = numerator.reshape(value.shape)
        divisor = divisor.repeat_interleave(self.options.merge_heads, dim=2)
        if text is None:
            out = numerator / (divisor + self.options.eps)[..., None]
        else:
            query, _, _ = tokens.softmax_parts()
            soft, lse = attention(query, *text, key_lengths=tokens.text_lengths, return_lse=True)
            out = joined(soft, lse, numerator, divisor)
        return (out + in_time + self.conv.in_space(value, tokens.grid)).to(value.dtype)

    def _before(self, tokens: Tokens, state: State | None) -> Tensor | None:
        """Return the earlier frames that the causal convolution along time reads; zeros at the start of a stream.

        None if the convolution reads no earlier frames.
        """
        if not self.conv.taps_before:
            return None
        if state is not None:
            return state["last"]
        places = tokens.grid.height * tokens.grid.width
        return tokens.value.new_zeros(tokens.value.shape[0], self.conv.taps_before * places, *tokens.value.shape[2:])
