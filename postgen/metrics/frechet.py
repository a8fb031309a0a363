"""Frechet distance of two sets of features, each fitted by a Gaussian (arXiv:1706.08500).

d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2). The distance depends on the features and on the number of
samples: it decreases towards its limit as the number grows. Compare only distances from equal numbers of samples and
the same features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import UserError


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean_D: Tensor
    covariance_DD: Tensor

    @classmethod
    def of(cls, features_ND: Tensor) -> Gaussian:
        """Fit a Gaussian to features (N, D), with the unbiased covariance.

        Raises:
            UserError: fewer than 2 rows, no features, a value that is not finite, or one so large that its square is
                not.
        """
        rows = features_ND.detach().double()
        if rows.dim() != 2 or len(rows) < 2 or not rows.shape[1] or not bool(rows.isfinite().all()):
            raise UserError(f"a Gaussian needs at least 2 rows of finite features (N, D), got {tuple(rows.shape)}")
        covariance = rows.T.cov().reshape(2 * rows.shape[1:])  # for one feature, torch returns a scalar
        if not bool(covariance.isfinite().all()):
            raise UserError(f"features up to {float(rows.abs().max()):.3g} are too large for a covariance: scale them")
        return cls(rows.mean(0), covariance)

    def root(self) -> Tensor:
        """Return the symmetric square root of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance_DD)
        found: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        return found


def frechet_distance(reference: Gaussian, other: Gaussian, *, root: Tensor | None = None) -> float:
    """Return the squared distance d^2. With Inception features this number is the FID.

    Args:
        reference: one Gaussian.
        other: the other Gaussian.
        root: `reference.root()`; pass it to avoid recomputing it when many Gaussians are compared with one reference.

    Raises:
        UserError: different numbers of features.

    >>> a = Gaussian(torch.zeros(2).double(), torch.eye(2).double())
    >>> round(frechet_distance(a, Gaussian(torch.ones(2).double(), 4 * torch.eye(2).double())), 6)
    4.0
    """
    sizes = len(reference.mean_D), len(other.mean_D)
    if sizes[0] != sizes[1]:
        raise UserError(f"a Frechet distance needs equal numbers of features, got {sizes[0]} and {sizes[1]}")
    root = reference.root() if root is None else root
    # The product is symmetric, so its eigenvalues are real even with fewer samples than features.
    values = torch.linalg.eigvalsh(root @ other.covariance_DD @ root).clamp_min(0)
    between = (reference.mean_D - other.mean_D).square().sum()
    traces = reference.covariance_DD.trace() + other.covariance_DD.trace()
    return max(0.0, float(between + traces - 2 * values.sqrt().sum()))
