"""`anchor`: softmax over every R-th token of the video, linear attention to the rest (arXiv:2509.24899).

With T_S every R-th token and all of the text, T_L the rest, phi a learned map of each head and R_i the rotation:

    y_i = (sum_{T_S} e^{s_ij} v_j + (R_i phi(q_i))^T sum_{T_L} R_j phi(k_j) v_j^T)
          / (sum_{T_S} e^{s_ij} + phi(q_i) . sum_{T_L} phi(k_j))

Both sums are scaled alike, so that none overflows. R = 1 is softmax.
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
    """Softmax to some keys and linear attention to the others: what hybrids of tokens and of frames share."""

    def __init__(self, shape: Shape, options: Any) -> None:
        super().__init__(shape)
        self.options = options
        self.map_query = feature_map(options.feature_map, shape.heads, shape.channels)
        self.map_key = feature_map(options.feature_map, shape.heads, shape.channels)

    def linear_flops(self, grid: Grid) -> int:
        """Return the FLOPs of the products of the linear part, and of its learned maps."""
        shape = self.shape
        learned = sum(weight.dim() == 3 for weight in self.parameters())
        return grid.tokens * shape.heads * shape.channels * (2 * shape.channels * (2 + learned) + 2)


class Anchor(Hybrid):
    """A hybrid of tokens."""

    kind = "anchor"
    options: AnchorOptions

    def covers(self, grid: Grid) -> bool:
        """Whether every token is one of softmax."""
        return self.options.every == 1 or grid.tokens == 1

    def forward(self, tokens: Tokens) -> Tensor:
        """Return the video's rows."""
        query, key, value = tokens.softmax_parts()
        soft, lse = attend(tokens, query, key[:, :: self.options.every], value[:, :: self.options.every])
        if self.covers(tokens.grid):
            return soft
        rest = torch.arange(tokens.grid.tokens, device=query.device) % self.options.every != 0
        # Zeros in the place of the anchors: the rotation goes by the place of a token.
        normed_query, normed_key = tokens.normed()
        q, k = self.map_query(normed_query), self.map_key(normed_key)
        k = torch.where(rest[:, None, None], k, 0)
        numerator, divisor = linear_parts(q, k, exact(value), tokens.rope)
        return joined(soft, lse, numerator, divisor).to(value.dtype)

    def flops(self, grid: Grid, text: int) -> int:
        """Return the FLOPs of a call of one sample."""
        shape, keys = self.shape, -(-grid.tokens // self.options.every)
        return (
            softmax_flops(grid.tokens, keys + text, shape)
            + self.linear_flops(grid)
            + softmax_flops(text, grid.tokens + text, shape)
        )


def attend(tokens: Tokens, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax attention to some keys of the video and all of the text, and the logarithm of its divisor."""
    text, lengths = tokens.text_keys(), tokens.text_lengths
    if text is not None:
        lengths = None if lengths is None else lengths + key.shape[1]
        key, value = torch.cat([key, text[0]], dim=1), torch.cat([value, text[1]], dim=1)
    return attention(query, key, value, key_lengths=None if text is None else lengths, return_lse=True)
