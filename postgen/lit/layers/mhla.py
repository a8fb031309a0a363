"""`mhla`: one linear state per block of tokens, mixed with learned weights for the queries of each block
(arXiv:2601.07832).

The grid of tokens is divided into blocks b. With the block i of the query, and a weight m per pair of blocks that all
heads share:

    S_b = sum_{j in b} R_j k_j v_j^T,  z_b = sum_{j in b} k_j,  y = (R q)^T sum_b m_ib S_b / (q . sum_b m_ib z_b + eps)

The layer clips m to (0, 1) and normalises its rows to the sum 1. A new layer begins with
m_ib = 1 - distance / (largest distance + 1). With one block the layer is `lit`. The weights belong to the grid for
which the layer was created. On another grid the blocks keep their size, so their number changes, and the layer
interpolates the weights along each axis.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.kernels.attention.ops import attention
from postgen.lit.features import GridConvolution, exact, feature, joined, no_autocast, rotate_both
from postgen.lit.layers.base import LitLayer, Shape, softmax_flops

if TYPE_CHECKING:
    from postgen.families import Grid
    from postgen.lit.options import MhlaOptions
    from postgen.lit.tokens import Tokens

Sizes = tuple[int, int, int]
"""Numbers along frames, rows and columns."""


class Mhla(LitLayer):
    """The layer type `mhla`: mixed linear states of blocks of tokens."""

    kind = "mhla"

    def __init__(self, shape: Shape, options: MhlaOptions) -> None:
        super().__init__(shape)
        if shape.grid is None:
            raise UserError(
                "the layer type mhla needs the grid of tokens that it is made for, but none was given: set"
                " grid=(frames, rows, columns)"
            )
        self.options, self.grid = options, _sizes(shape.grid)
        if any(count > size for count, size in zip(options.blocks, self.grid, strict=True)):
            raise UserError(
                f"mhla: {options.blocks} blocks do not fit into a grid of {self.grid} tokens (frames, rows, columns):"
                " use at most one block per token along each axis"
            )
        self.mixing = nn.Parameter(first_mixing(options.blocks))
        self._by_block: dict[tuple[Grid, Sizes, torch.device], tuple[Tensor, Tensor, int]] = {}
        self.conv = GridConvolution(
            shape.heads * shape.channels, options.conv_space, options.conv_time, init=options.conv_init
        )

    def forward(self, tokens: Tokens) -> Tensor:
        """Return the outputs of the video tokens, (B, N, H, D)."""
        query, key = tokens.centered() if self.options.center_keys else tokens.normed()
        q, k = (feature(exact(x), self.options.feature_map) for x in (query, key))
        blocks = self.blocks_on(tokens.grid)
        weights = mixed(self.mixing.to(q.dtype), self.options.blocks, blocks)
        place = (tokens.grid, blocks, q.device)
        if place not in self._by_block:
            self._by_block[place] = _by_block(*place)
        numerator, divisor = self._parts(tokens, q, k, weights, self._by_block[place])
        value, text = tokens.value, tokens.text_keys()
        if text is not None:
            rotated, _, _ = tokens.softmax_parts()
            soft, lse = attention(rotated, *text, key_lengths=tokens.text_lengths, return_lse=True)
            out = joined(soft, lse, numerator, divisor)
        else:
            out = numerator / (divisor + self.options.eps)[..., None] if self.options.divisor else numerator
        conv = self.conv.in_space(value, tokens.grid) + self.conv.in_time(value, tokens.grid)
        rows: Tensor = out + conv
        return rows.to(value.dtype)

    def blocks_on(self, grid: Grid) -> Sizes:
        """Return the number of blocks along each axis of a grid.

        Raises:
            UserError: the layer was created for another grid, and its options have interpolate=False.
        """
        given = _sizes(grid)
        if given == self.grid:
            return self.options.blocks
        if not self.options.interpolate:
            raise UserError(
                f"this mhla layer is made for a grid of {self.grid} tokens (frames, rows, columns), got {given}: use"
                " latents of that size, or convert with interpolate=True"
            )
        scaled = [
            max(1, min(size, round(count * size / made)))
            for count, size, made in zip(self.options.blocks, given, self.grid, strict=True)
        ]
        return scaled[0], scaled[1], scaled[2]

    def _parts(
        self, tokens: Tokens, q: Tensor, k: Tensor, weights: Tensor, by_block: tuple[Tensor, Tensor, int]
    ) -> tuple[Tensor, Tensor]:
        """Return the numerator (B, N, H, D) and the divisor (B, N, H): sum states per block, mix, multiply queries."""
        order, back, length = by_block
        rope, value = tokens.rope, exact(tokens.value)
        scale = 1 if self.options.divisor or tokens.text else 1 / tokens.grid.tokens

        def grouped(x: Tensor) -> Tensor:
            # Blocks differ in size. Index N, a token of zeros, fills up the smaller ones.
            padded = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], dim=1)[:, order]
            return padded.reshape(x.shape[0], len(weights), length, *x.shape[2:])

        turned_query, turned_key = rotate_both(q, k, rope)
        turned, keys = grouped(turned_key), grouped(k)
        with no_autocast(value):
            states = torch.einsum("bmjhd,bmjhe->bmhde", turned, grouped(value)) * scale
            mixed_states = torch.einsum("im,bmhde->bihde", weights, states)
            mixed_keys = torch.einsum("im,bmhd->bihd", weights, keys.sum(dim=2))
            numerator = torch.einsum("bijhd,bihde->bijhe", grouped(turned_query), mixed_states)
            divisor = torch.einsum("bijhd,bihd->bijh", grouped(q), mixed_keys)
        return numerator.flatten(1, 2)[:, back], divisor.flatten(1, 2)[:, back]

    def flops(self, grid: Grid, text: int) -> int:
        """Return the FLOPs of one call with one sample."""
        shape, blocks = self.shape, torch.Size(self.blocks_on(grid)).numel()
        width = shape.heads * shape.channels
        taps = sum(weight[0].numel() for weight in self.conv.parameters())
        return (
            grid.tokens * width * (4 * shape.channels + 2 * taps)
            + 2 * blocks**2 * width * (shape.channels + 1)
            + softmax_flops(grid.tokens, text, shape)
            + softmax_flops(text, grid.tokens + text, shape)
        )


def first_mixing(blocks: Sizes) -> Tensor:
    """Return the mixing weights of a new layer for M blocks, (M, M): they decrease with the distance of two blocks."""
    axes = [torch.arange(count, dtype=torch.float32) for count in blocks]
    places = torch.cartesian_prod(*axes).view(-1, 3)
    distance = torch.cdist(places, places)
    return 1 - distance / (distance.max() + 1)


def mixed(mixing: Tensor, made: Sizes, blocks: Sizes) -> Tensor:
    """Return the mixing weights for a call, (M', M'), with rows that sum to 1.

    Args:
        mixing: the learned weights, (M, M).
        made: number of blocks along each axis for which the weights were learned; M in total.
        blocks: number of blocks along each axis in this call; M' in total.
    """
    weights = mixing.clamp(1e-6, 1)
    if made != blocks:
        across = torch.ones(1, 1, dtype=mixing.dtype, device=mixing.device)
        for count, wanted in zip(made, blocks, strict=True):
            across = torch.kron(across, _interpolation(count, wanted).to(across))
        with no_autocast(mixing):
            weights = across @ weights @ across.T
    return weights / weights.sum(dim=1, keepdim=True)


def _interpolation(count: int, wanted: int) -> Tensor:
    """Return the matrix (wanted, count) that interpolates linearly between block centres, constant at the ends."""
    places = ((torch.arange(wanted, dtype=torch.float64) + 0.5) * count / wanted - 0.5).clamp(0, count - 1)
    return (1 - (places[:, None] - torch.arange(count)).abs()).clamp(min=0)


def _sizes(grid: Grid) -> Sizes:
    return grid.frames, grid.height, grid.width


def _by_block(grid: Grid, blocks: Sizes, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Return how tokens are sorted into blocks of equal length.

    Block sizes differ by at most one token along each axis, so smaller blocks are padded.

    Returns:
        order: token index of each slot, (blocks * length,); N marks padding.
        back: slot of each token, (N,).
        length: slots per block.
    """
    frames, rows, columns = (
        torch.arange(size) * count // size for size, count in zip(_sizes(grid), blocks, strict=True)
    )
    block = ((frames[:, None, None] * blocks[1] + rows[:, None]) * blocks[2] + columns).flatten()
    count = blocks[0] * blocks[1] * blocks[2]
    sizes = torch.bincount(block, minlength=count)
    length = math.prod(-(-size // along) for size, along in zip(_sizes(grid), blocks, strict=True))
    tokens = block.argsort(stable=True)
    slots = block[tokens] * length + torch.arange(len(block)) - (sizes.cumsum(0) - sizes)[block[tokens]]
    order = torch.full((count * length,), len(block)).scatter(0, slots, tokens)
    back = torch.empty_like(block).scatter(0, tokens, slots)
    return order.to(device), back.to(device), length
