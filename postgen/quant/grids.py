"""Element grids: the numbers that one quantised element can have, before its scale.

Rounding is to the nearest number of the grid, ties to even; values beyond the largest number become the largest.
Integer grids are symmetric, -(2^(b-1) - 1) to 2^(b-1) - 1: the number -2^(b-1) would bias the mean (arXiv:2510.25602,
section 4). Floating-point grids have a sign, e exponent bits with a bias and m mantissa bits, and no infinity (OCP
Microscaling Formats v1.0).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class IntGrid:
    """The whole numbers -(2^(b-1) - 1) ... 2^(b-1) - 1, or 0 ... 2^b - 1 if unsigned."""

    bits: int
    unsigned: bool = False
    """Unsigned numbers are used with a zero point."""

    @property
    def largest(self) -> float:
        """The largest number of the grid."""
        return float(2**self.bits - 1 if self.unsigned else 2 ** (self.bits - 1) - 1)

    @property
    def least(self) -> float:
        """The smallest number of the grid."""
        return 0.0 if self.unsigned else -self.largest

    @property
    def exponent(self) -> int:
        """Exponent of the largest power of two that the OCP rule `floor` assumes for the grid."""
        return self.bits - 2

    def round(self, x: Tensor) -> Tensor:
        """Round x to the grid."""
        return x.round().clamp(self.least, self.largest)

    def encode(self, values: Tensor) -> Tensor:
        """Return the bit pattern of numbers of the grid, uint8; negative numbers in two's complement of b bits."""
        return values.to(torch.int16).bitwise_and(2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the numbers of bit patterns (the inverse of `encode`), float32."""
        found = codes.float()
        return found if self.unsigned else torch.where(found > self.largest, found - 2**self.bits, found)


@dataclass(frozen=True, kw_only=True, slots=True)
class FloatGrid:
    """Floating-point numbers with a sign, subnormal numbers and no infinity."""

    exponent_bits: int
    mantissa_bits: int
    largest: float
    """The largest number of the grid."""

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """Exponent bias."""
        return max(1, (1 << self.exponent_bits - 1) - 1)

    @property
    def least(self) -> float:
        """The smallest (most negative) number of the grid."""
        return -self.largest

    @property
    def exponent(self) -> int:
        """Exponent of the largest power of two in the grid."""
        _, exponent = math.frexp(self.largest)
        return exponent - 1

    def round(self, x: Tensor) -> Tensor:
        """Round x to the grid."""
        # frexp returns a mantissa in [.5, 1), so the exponent of |x| is one less. It is exact, unlike log2.
        exponent = (x.frexp().exponent - 1).clamp_min(1 - self.bias)
        step = torch.ldexp(torch.ones_like(x), exponent - self.mantissa_bits)
        return ((x / step).round() * step).clamp(-self.largest, self.largest)

    def encode(self, values: Tensor) -> Tensor:
        """Return the bit pattern of numbers of the grid, uint8, with the sign in the highest bit."""
        table = self._positive(values.device)
        below = torch.bucketize(values.abs().float(), table)  # exact numbers: the index of the equal one
        sign = torch.signbit(values).to(torch.uint8) << (self.bits - 1)
        return below.to(torch.uint8) | sign

    def decode(self, codes: Tensor) -> Tensor:
        """Return the numbers of bit patterns (the inverse of `encode`), float32."""
        half = 1 << (self.bits - 1)
        size = self._positive(codes.device)[(codes & (half - 1)).long()]
        return torch.where(codes >= half, -size, size)

    def _positive(self, device: torch.device) -> Tensor:
        return _positive(self.exponent_bits, self.mantissa_bits, self.bias, self.largest, device)


Grid = IntGrid | FloatGrid


@functools.cache
@torch.inference_mode(False)  # a tensor made in inference mode could not be used in training later
def _positive(exponent_bits: int, mantissa_bits: int, bias: int, largest: float, device: torch.device) -> Tensor:
    """Return the numbers from 0 to the largest in order; the place of a number is its bit pattern without the sign."""
    codes = torch.arange(2 ** (exponent_bits + mantissa_bits))
    exponent, mantissa = codes >> mantissa_bits, codes & (2**mantissa_bits - 1)
    whole = mantissa + torch.where(exponent > 0, 2**mantissa_bits, 0)
    found = torch.ldexp(whole.float(), exponent.clamp_min(1) - bias - mantissa_bits)
    # Patterns beyond the largest number mean NaN: E4M3 has one. They stay out of the table.
    return found[found <= largest].to(device)
