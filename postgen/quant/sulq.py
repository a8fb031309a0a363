"""Shifted uniform quantisation of logarithms (SULQ), for attention probabilities (arXiv:2311.10126, section 3.2).

    y = log2(x + eta),  codes are b-bit and evenly spaced between the least and the largest y,  ~x = 2^round(~y) - eta

A logarithm without the shift eta wastes codes on numbers near 0: 3 bits keep only 1 ... 2^-7. The rounded exponent
makes the product with values a shift of bits. The released code has one code more than 2^b in a forward pass; here
there are 2^b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from postgen.errors import UserError, check_number, is_number, shown
from postgen.quant.gradients import through

ETAS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shifts among which `Sulq.search` chooses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sulq:
    """The quantiser of attention probabilities.

    Raises:
        UserError: a number is out of range.
    """

    bits: int
    """Bits of a code, 1 to 8."""
    eta: float
    """The shift, above 0."""
    low: float
    """The least log2(x + eta)."""
    high: float
    """The largest log2(x + eta)."""

    def __post_init__(self) -> None:
        check_number("bits", self.bits, 1, 8, whole=True)
        if not (is_number(self.eta) and self.eta > 0):
            raise UserError(f"eta must be a number above 0, got {shown(self.eta)}")

    @classmethod
    def of(cls, x: Tensor, bits: int, eta: float) -> Sulq:
        """Return the quantiser whose range is that of some numbers x >= 0."""
        y = (x.float() + eta).log2()
        return cls(bits=bits, eta=eta, low=float(y.min()), high=float(y.max()))

    @classmethod
    def search(cls, x: Tensor, bits: int, etas: Sequence[float] = ETAS) -> Sulq:
        """Return the quantiser with the least mean squared error on some numbers x >= 0.

        Raises:
            UserError: there are no shifts to choose from.
        """
        if not etas:
            raise UserError("etas is empty: give at least one shift")
        found = [cls.of(x, bits, eta) for eta in etas]
        return min(found, key=lambda each: float((each.numbers(each.codes(x)) - x.float()).square().mean()))

    @property
    def step(self) -> float:
        """Difference of log2(x + eta) between neighbouring codes."""
        return max((self.high - self.low) / (2.0**self.bits - 1), float(torch.finfo(torch.float32).tiny))

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of numbers x, 0 ... 2^bits - 1, float32."""
        return (((x.float() + self.eta).log2() - self.low) / self.step).round().clamp(0, 2**self.bits - 1)

    def numbers(self, codes: Tensor) -> Tensor:
        """Return the numbers that codes represent, float32. The number of the lowest codes may be a little below 0."""
        return (codes * self.step + self.low).round().exp2() - self.eta

    def __call__(self, x: Tensor) -> Tensor:
        """Return the numbers that the codes of x represent, in the dtype of x; gradients pass through the rounding."""
        return through(x, self.numbers(self.codes(x)).to(x.dtype))
