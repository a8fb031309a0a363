"""Packed weights of every kind for the tests of their expansion, on any device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A packed weight: its sizes and format."""

    rows: int
    channels: int
    group: int
    bits: int
    signed: bool = True
    zeros: bool = False
    table: bool = False
    shared: str = ""
    """Which rows share a scale: "" none, "tensor" all, "block" 128."""

    def __str__(self) -> str:
        kind = "table" if self.table else "signed" if self.signed else "unsigned"
        return f"{self.rows}x{self.channels} g{self.group} {self.bits} bits {kind} {self.shared}"

    def arguments(self, dtype: torch.dtype, row_scale: Tensor | None = None, device: str = "cpu") -> tuple[Any, ...]:
        """Return the arguments of `expand`: random bytes are codes of any format."""
        generator = torch.Generator().manual_seed(0)
        size = -(-self.channels * self.bits // 8)
        codes = torch.randint(0, 256, (self.rows, size), generator=generator, dtype=torch.uint8)
        rows = {"": self.rows, "tensor": 1, "block": -(-self.rows // 128)}[self.shared]
        scale = torch.rand(rows, self.channels // self.group, generator=generator) + 0.1
        zero = torch.randint(0, 2**self.bits, scale.shape, generator=generator).float() if self.zeros else None
        table = torch.randn(2**self.bits, generator=generator) if self.table else None
        moved = [None if each is None else each.to(device) for each in (codes, scale, zero, table, row_scale)]
        return (*moved, self.bits, self.channels, self.signed, dtype)


CASES = [
    Case(3, 64, 64, 4),
    Case(5, 192, 32, 4, signed=False, zeros=True),
    Case(2, 5120, 5120, 4),
    *(Case(4, 96, 48, bits) for bits in (1, 2, 3, 5, 6, 7, 8)),
    *(Case(3, 20, 20, bits, signed=False, zeros=True) for bits in (2, 3, 8)),
    Case(6, 64, 16, 4, table=True),
    Case(6, 64, 32, 6, table=True),
    Case(4, 64, 32, 8, table=True),
    Case(7, 64, 64, 4, shared="tensor"),
    Case(200, 256, 128, 8, shared="block"),
    Case(1, 9, 3, 3),
]


def planes_of(planes: int, rows: int, channels: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return random bit planes (k, N, bytes) and coefficients (N, groups, k + 1)."""
    generator = torch.Generator().manual_seed(0)
    streams = torch.randint(0, 256, (planes, rows, -(-channels // 8)), generator=generator, dtype=torch.uint8)
    return streams, torch.randn(rows, channels // group, planes + 1, generator=generator).to(dtype)
