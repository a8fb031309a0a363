"""The low-rank branch of SVDQuant (arXiv:2411.05007): W = up down + residual, of which only the residual is quantised.

    y = Q(x) Q(residual)^T + up (down x)

The branch is the best approximation of its rank for inputs with the second moment M: with the first left singular
vectors U of W M^(1/2), it is U U^T W. A scale that moves outliers of the input into the weight (`let.initial_scale`)
comes first, because the branch takes them from there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from postgen.errors import UserError


@torch.no_grad()
def low_rank_branch(
    weight: Tensor, rank: int, *, moment: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return the branch of a weight, (up (N, r), down (r, K)), in `dtype`.

    Args:
        weight: (N, K).
        rank: the rank r, from 1 to min(N, K).
        moment: second moment of the inputs, (K,) or (K, K); None takes all inputs as equally important. A Hessian
            is one.
        dtype: dtype of the branch; None is that of the weight.

    Raises:
        UserError: the rank is out of range, or the moment has the wrong shape.
    """
    rows, channels = weight.shape
    if not 1 <= rank <= min(rows, channels):
        raise UserError(f"rank is {rank}, but the weight is {rows} x {channels}: use 1 to {min(rows, channels)}")
    return _branch(weight, rank, _root(weight, moment), dtype or weight.dtype)


@torch.no_grad()
def refined_branch(
    weight: Tensor,
    rank: int,
    rounded: Callable[[Tensor], Tensor],
    *,
    moment: Tensor | None = None,
    dtype: torch.dtype | None = None,
    iterations: int = 10,
) -> tuple[Tensor, Tensor]:
    """Return the branch after alternating steps: round the residual, then fit the branch to what rounding lost.

    The first branch is that of `low_rank_branch`. The steps end when one does not reduce the error, and the branch
    with the least error is the result.

    Args:
        weight, rank, moment, dtype: as for `low_rank_branch`.
        rounded: the quantised residual's numbers, (N, K) -> (N, K).
        iterations: largest number of branches that are tried.

    Raises:
        UserError: as for `low_rank_branch`.
    """
    best = low_rank_branch(weight, rank, moment=moment, dtype=dtype)
    root = _root(weight, moment)
    least, branch = float("inf"), best
    for _ in range(iterations):
        kept = rounded(residual_of(weight, branch)).float()
        lost = residual_of(weight, branch) - kept
        error = float(_times(lost.double(), root).square().sum())
        if error >= least:
            break
        best, least = branch, error
        branch = _branch(weight.float() - kept, rank, root, branch[0].dtype)
    return best


def residual_of(weight: Tensor, branch: tuple[Tensor, Tensor]) -> Tensor:
    """Return weight - up down (N, K), float32: what is left to quantise."""
    up, down = branch
    return weight.float() - up.float() @ down.float()


def _branch(weight: Tensor, rank: int, root: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    exact = weight.double()
    scaled = _times(exact, root)
    # The eigenvectors of the smaller Gram matrix give the first singular vectors faster than a whole decomposition.
    tall = scaled.shape[0] > scaled.shape[1]
    values, vectors = torch.linalg.eigh(scaled.T @ scaled if tall else scaled @ scaled.T)
    left = vectors[:, -rank:]
    if tall:
        left = torch.linalg.qr(scaled @ left).Q
    # Both factors have similar sizes; a direction that the weight does not have keeps a small factor.
    sizes = values[-rank:].clamp_min(values[-1] * 1e-12).clamp_min(1e-30) ** 0.25
    return (left * sizes).to(dtype), ((left.T @ exact) / sizes[:, None]).to(dtype)


def _root(weight: Tensor, moment: Tensor | None) -> Tensor | None:
    """Return M^(1/2) up to a rotation: (K,) or (K, K), float64."""
    channels = weight.shape[1]
    if moment is None:
        return None
    exact = moment.to(weight.device, torch.float64)
    if exact.shape == (channels,):
        return exact.clamp_min(0).sqrt()
    if exact.shape != (channels, channels):
        raise UserError(
            f"the second moment has shape {tuple(exact.shape)}: it must be ({channels},) or ({channels}, {channels})"
        )
    # M = V D V^T exists without full rank, unlike a Cholesky factor.
    values, vectors = torch.linalg.eigh(exact)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def _times(weight: Tensor, root: Tensor | None) -> Tensor:
    if root is None:
        return weight
    return weight * root if root.dim() == 1 else weight @ root
