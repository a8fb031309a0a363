"""`anchor`: softmax attention over every R-th token of the video, linear attention over the rest (arXiv:2509.24899).

T_S holds every R-th video token and all text tokens, T_L holds the other video tokens. phi is a learned feature map
per head, R_i is the rotary embedding of token i, and s_ij is the softmax score of query i and key j:

    y_i = (sum_{T_S} e^{s_ij} v_j + (R_i phi(q_i))^T sum_{T_L} R_j phi(k_j) v_j^T)
          / (sum_{T_S} e^{s_ij} + phi(q_i) . sum_{T_L} phi(k_j))

The implementation multiplies both sums by the same factor, so that neither overflows. With R = 1 the layer computes
softmax attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from postgen.kernels.attention.ops import attention
from postgen.lit.features import exact, feature_map, joined, linear_parts
from postgen.lit.layers.base import LitLayer, Shape, softmax_flops

if TYPE_CHECKING:
    from postgen.families import Grid
    from postgen.lit.options import AnchorOptions
    from postgen.lit.tokens import Tokens


class Hybrid(LitLayer):
    """Base class of layers that combine softmax attention over some keys with linear attention over the others.

    `Anchor` splits the keys by token, `Chunk` splits them by frame.
    """

    def __init__(self, shape: Shape, options: Any) -> None:
        super().__init__(shape)
        self.options = options
        self.map_query = feature_map(options.feature_map, shape.heads, shape.channels)
        self.map_key = feature_map(options.feature_map, shape.heads, shape.channels)

    def linear_flops(self, grid: Grid) -> int:
        """Return the FLOPs of the linear part: its matrix products and its learned feature maps."""
        shape = self.shape
        learned = sum(weight.dim() == 3 for weight in self.parameters())
        return grid.tokens * shape.heads * shape.channels * (2 * shape.channels * (2 + learned) + 2)


class Anchor(Hybrid):
    """The layer type `anchor`: softmax over every R-th token, linear attention over the rest."""

    kind = "anchor"
    options: AnchorOptions

    def covers(self, grid: Grid) -> bool:
        """Whether softmax covers every token of this grid, so that the layer equals the stock attention."""
        return self.options.every == 1 or grid.tokens == 1

    def forward(self, tokens: Tokens) -> Tensor:
        """Return the outputs of the video tokens, (B, N, H, D)."""
        query, key, value = tokens.softmax_parts()
        soft, lse = attend(tokens, query, key[:, :: self.options.every], value[:, :: self.options.every])
        if self.covers(tokens.grid):
            return soft
        rest = torch.arange(tokens.grid.tokens, device=query.device) % self.options.every != 0
        # The linear part must not count the anchors. Their keys become zero instead of being removed, because the
        # rotary embedding depends on the position of a token in the sequence.
        normed_query, normed_key = tokens.normed()
        q, k = self.map_query(normed_query), self.map_key(normed_key)
        k = torch.where(rest[:, None, None], k, 0)
        numerator, divisor = linear_parts(q, k, exact(value), tokens.rope)
        return joined(soft, lse, numerator, divisor).to(value.dtype)

    def flops(self, grid: Grid, text: int) -> int:
        """Return the FLOPs of one call with one sample."""
        shape, keys = self.shape, -(-grid.tokens // self.options.every)
        return (
            softmax_flops(grid.tokens, keys + text, shape)
            + self.linear_flops(grid)
            + softmax_flops(text, grid.tokens + text, shape)
        )


def attend(tokens: Tokens, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Compute softmax attention over some keys of the video and all keys of the text.

    Args:
        tokens: the call; the text keys and values come from here.
        query: video queries, normalised and rotated, (B, N, H, D).
        key: the selected video keys, normalised and rotated, (B, K, H, D).
        value: the values of these keys, (B, K, H, D).

    Returns:
        The attention output, (B, N, H, D), and the logarithm of the softmax divisor, (B, H, N).
    """
    text, lengths = tokens.text_keys(), tokens.text_lengths
    if text is not None:
        lengths = None if lengths is None else lengths + key.shape[1]
        key, value = torch.cat([key, text[0]], dim=1), torch.cat([value, text[1]], dim=1)
    return attention(query, key, value, key_lengths=None if text is None else lengths, return_lse=True)
