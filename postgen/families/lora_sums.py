"""Weighted sums of low-rank changes of one weight, without the dense matrix.

The change of a weight by the i-th LoRA is s_i B_i A_i. The mean of the factors A_i and B_i is not a LoRA of the mean
change. For weights w_i the sum of the changes is exactly

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, ...] [A_1; ...] = Q_B (R_B R_A^T) Q_A^T

with thin QR decompositions of the concatenated factors. The SVD of the small core R_B R_A^T, N r x N r for N LoRAs of
rank r, is the SVD of the sum: its largest singular values are the best approximation of a lower rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from postgen.errors import UserError

from .lora_layers import Layer

_ZERO = 1e-12
"""Singular values below this share of the largest one are rounding errors of float64."""


class LowRank(NamedTuple):
    """A matrix as its singular value decomposition, in float64."""

    left: Tensor
    """(out, k), orthonormal columns."""
    sigma: Tensor
    """(k,), singular values, the largest first."""
    right: Tensor
    """(k, in), orthonormal rows where the singular value is above 0."""

    @property
    def rank(self) -> int:
        """Number of singular values above the rounding errors, at least 1."""
        return max(1, int((self.sigma > _ZERO * self.sigma[:1]).sum()))

    def energy(self, rank: int) -> tuple[float, float]:
        """Return the sums of the squares of the `rank` largest singular values, and of all of them."""
        squares = self.sigma.square()
        return float(squares[:rank].sum()), float(squares.sum())

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return up (out, r) and down (r, in) whose product is the best approximation of rank r = min(rank, k).

        Both have the same norms. A matrix of zeros has zeros in `up` only: a pair of two zero matrices could not be
        trained further.
        """
        root = self.sigma[:rank].sqrt()
        down = root[:, None] * self.right[:rank] if self.sigma[0] > 0 else self.right[:rank]
        return self.left[:, :rank] * root, down


def low_rank_sum(pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> LowRank:
    """Return sum_i w_i up_i down_i by thin QR decompositions and the SVD of the small core.

    Args:
        pairs: up (out, r_i) and down (r_i, in) of each change, on the CPU; the ranks may differ.
        weights: weight of each change.
    """
    up = torch.cat([weight * up.double() for (up, _), weight in zip(pairs, weights, strict=True)], dim=1)
    down = torch.cat([down.double() for _, down in pairs])
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    left, sigma, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return LowRank(q_up @ left, sigma, right @ q_down.T)


def low_rank_of(matrix: Tensor) -> LowRank:
    """Return the decomposition of a dense matrix (out, in), by the eigenvectors of its smaller Gram matrix.

    Singular values below 1e-8 of the largest one are inexact, but every truncation is the projection of the matrix on
    the vectors that are kept.
    """
    if matrix.shape[0] > matrix.shape[1]:
        turned = low_rank_of(matrix.T)
        return LowRank(turned.right.T, turned.sigma, turned.left.T)
    matrix = matrix.double()
    left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)
    right = left.T @ matrix
    sigma = right.norm(dim=1)
    return LowRank(left, sigma, right / sigma.clamp_min(torch.finfo(torch.float64).tiny)[:, None])


def matrices(layer: Layer, name: str) -> tuple[Tensor, Tensor]:
    """Return up (out, r), times the scale of the layer, and down (r, in), with the kernel of a convolution in `in`.

    Args:
        layer: the layer of a linear layer or of a convolution.
        name: name of the layer, for the message.

    Raises:
        UserError: the second matrix of a convolution has a kernel.
    """
    if layer.up[0, 0].numel() != 1:
        raise UserError(
            f"{name}: lora_B of this convolution has the shape {tuple(layer.up.shape)}: only a kernel in lora_A can be"
            " merged"
        )
    return layer.up.flatten(1).double() * layer.scale, layer.down.flatten(1).double()


def shaped(low: LowRank, rank: int, like: Layer) -> Layer:
    """Return the truncation of a sum as a float32 layer of scale 1, with the dimensions of the layer `like`."""
    up, down = low.factors(rank)
    more = (1,) * (like.up.ndim - 2)
    return Layer(
        down.float().reshape(len(down), *like.down.shape[1:]).contiguous(),
        up.float().reshape(*up.shape, *more).contiguous(),
    )


def padded(layer: Layer, rank: int) -> Layer:
    """Return a layer with rows and columns of zeros up to a rank, which change nothing."""
    if (more := rank - layer.rank) <= 0:
        return layer
    down = torch.cat([layer.down, layer.down.new_zeros(more, *layer.down.shape[1:])])
    up = torch.cat([layer.up, layer.up.new_zeros(len(layer.up), more, *layer.up.shape[2:])], dim=1)
    return replace(layer, down=down, up=up)
