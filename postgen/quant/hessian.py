"""Second moments of a linear layer's inputs, and the triangular factor that GPTQ and BPDQ need.

For inputs x (K) the error that rounding adds to the output of a row w is sum_x ((w - ~w) x)^2 = (w - ~w) H (w - ~w)^T
with H = sum_x x x^T. With the upper triangular U of H^-1 = U^T U, it is ||(w - ~w) U^-1||^2 (arXiv:2210.17323).

    sums = HessianSum(linear.in_features)
    for x, bin in inputs:               # the layer's inputs, in any number of calls
        sums.add(x, bin=bin)
    hessian = sums.finish()
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from postgen.errors import UserError, check_number

_ROWS = 16384
"""Rows of one product; more rows need more memory for their float32 copy."""
_CHEAP = 2048
"""Largest number of channels for which sums are kept in float64: 32 MiB for each bin."""


class HessianSum:
    """Running sums of x x^T over the inputs of a linear layer, one sum for each bin.

    The sums of the bins are scaled to an equal mean diagonal before they are added, so that no noise level dominates
    by the size or the number of its inputs. A bin takes 4 K^2 bytes (8 K^2 up to 2048 channels). Where this is too
    much, use one bin, and give each call the weight 1 / (mean square of the inputs of its noise level).

    Args:
        channels: K, the number of input channels.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self._sums: dict[Hashable, Tensor] = {}
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """Number of inputs so far."""
        return self._tokens

    def add(self, x: Tensor, weight: float = 1.0, *, bin: Hashable = 0) -> None:
        """Add inputs (..., K) of any floating-point dtype to the sum of a bin.

        Args:
            x: inputs; the sums are kept on the device of the first ones.
            weight: factor of these inputs relative to others of the bin, at least 0.
            bin: the bin, for instance a noise level and a guidance branch.

        Raises:
            UserError: the inputs have another number of channels, or the weight is wrong.
        """
        check_number("weight", weight, 0)
        if x.shape[-1] != self.channels:
            raise UserError(f"the inputs have {x.shape[-1]} channels, but the layer has {self.channels}")
        rows = x.detach().reshape(-1, self.channels)
        if bin not in self._sums:
            exact = torch.float64 if self.channels <= _CHEAP else torch.float32
            first = next(iter(self._sums.values()), rows)
            self._sums[bin] = torch.zeros(self.channels, self.channels, dtype=exact, device=first.device)
        total = self._sums[bin]
        # Observers run inside the model's forward pass, where autocast would round the products to 16 bits.
        with torch.autocast(rows.device.type, enabled=False):
            for part in rows.split(_ROWS):
                part = part.float()
                total.add_((part.T @ part).to(total), alpha=weight)
        self._tokens += len(rows)

    def finish(self, damping: float = 0.01) -> Hessian:
        """Return the Hessian of all inputs.

        Args:
            damping: number that is added to the diagonal, relative to its mean, 0 to 1. Where the matrix is not
                positive definite even so, it is multiplied by 10 until it is; `Hessian.damping` is the final value.

        Raises:
            UserError: there are no inputs, all are 0, or some are not finite.
        """
        check_number("damping", damping, 0, 1)
        total = torch.zeros(self.channels, self.channels)
        for bin, each in self._sums.items():
            size = each.diagonal().mean()
            if not size.isfinite():
                raise UserError(
                    f"the inputs of bin {bin!r} have values that are not finite: load the model in bfloat16"
                )
            if size > 0:
                total = total.to(each) + each / size
        if not total.any():
            raise UserError("a Hessian needs inputs that are not all 0: add inputs before finish")
        return Hessian.of(total, damping, tokens=self._tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hessian:
    """H = sum of x x^T over the inputs of a layer, damped, with mean diagonal 1 before the damping."""

    matrix: Tensor
    """Float32 (K, K), with the damping."""
    upper: Tensor
    """The upper triangular U of H^-1 = U^T U, float32 (K, K)."""
    damping: float
    """Number that was added to the diagonal."""
    tokens: int = 0
    """Number of inputs."""

    @classmethod
    def of(cls, matrix: Tensor, damping: float = 0.01, *, tokens: int = 0) -> Hessian:
        """Return the Hessian of a matrix (K, K): symmetric, positive semidefinite, of any scale.

        Args:
            matrix: the sum of x x^T.
            damping: see `HessianSum.finish`.
            tokens: number of inputs.

        Raises:
            UserError: the matrix is 0, not finite, or it is not positive definite even with a damping of 1.
        """
        size = matrix.diagonal().double().mean()
        if not (size.isfinite() and size > 0 and matrix.isfinite().all()):
            raise UserError("a Hessian must be finite and not 0: check the inputs from which it was computed")
        damped, upper, damping = _damped(matrix.double() / size, damping)
        return cls(matrix=damped.float(), upper=upper.float(), damping=damping, tokens=tokens)

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return len(self.matrix)

    def reordered(self, order: Tensor) -> Hessian:
        """Return the Hessian of the channels in another order: channel i of the result is channel order[i]."""
        # The damping is in the matrix already. Only the rounding to float32 can make more of it necessary.
        matrix, upper, more = _damped(self.matrix[order][:, order].double(), 0.0)
        return replace(self, matrix=matrix.float(), upper=upper.float(), damping=self.damping + more)

    def to(self, device: torch.device) -> Hessian:
        """Return the Hessian on a device."""
        return replace(self, matrix=self.matrix.to(device), upper=self.upper.to(device))

    def error(self, weight: Tensor, rounded: Tensor) -> float:
        """Return the squared error of the layer's output relative to the squared output, with the damping.

        Args:
            weight: the exact weight (N, K).
            rounded: the numbers of the quantised weight (N, K).
        """
        exact, noise = weight.double(), weight.double() - rounded.double()
        matrix = self.matrix.to(weight.device).double()
        return float(((noise @ matrix) * noise).sum() / ((exact @ matrix) * exact).sum())


def _damped(matrix: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """Return the damped matrix, its factor, and the damping that was needed."""
    while True:
        damped = matrix.clone()
        damped.diagonal().add_(damping)
        upper = _factor(damped)
        if upper is not None:
            return damped, upper, damping
        if damping >= 1:
            raise UserError("the Hessian is not positive semidefinite: check the inputs from which it was computed")
        damping = min(1.0, max(damping, 1e-7) * 10)


def _factor(matrix: Tensor) -> Tensor | None:
    """Return the upper U with matrix^-1 = U^T U; None if the matrix is not positive definite.

    The Cholesky factor of the matrix in reversed order, reversed again, is an upper V with V V^T = matrix, and
    U = V^-1. This is more exact than two Cholesky factorisations around an inverse.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if failed:
        return None
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
    return upper if upper.isfinite().all() else None
