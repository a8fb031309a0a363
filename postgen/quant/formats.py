"""Number formats of quantised weights and activations, by name.

A text such as "int4:g64" names a format: elements on a 4-bit integer grid, 64 numbers along the input channels share
one scale. See `format_of` for the grammar and `FORMATS` for the names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from postgen.errors import UserError, did_you_mean, shown
from postgen.quant.grids import FloatGrid, Grid, IntGrid

Scale = Literal["float32", "e8m0", "e4m3"]
"""Number format of the scales: float32, powers of two in one byte (E8M0), or E4M3 and a float32 number."""
Rule = Literal["rceil", "floor"]
"""How the scale of a group with largest absolute value a becomes a power of two: "rceil" is the smallest power that
clips nothing, 2^ceil(log2(a / largest)) (arXiv:2510.25602, eq. 3); "floor" is the OCP rule, which may clip."""
SQUARE = 128
"""Rows and columns of a weight that share one scale in the format "fp8:block"; tokens share it over 128 channels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A number format: an element grid, and how many elements share a scale."""

    name: str
    """Name in `FORMATS`."""
    grid: Grid
    """Grid of the elements; for bit planes, the grid of the plane patterns 0 ... 2^k - 1."""
    share: int | Literal["row", "tensor", "block"]
    """Elements along the input channels that share one scale; "row": all of a row (an output channel of a weight, a
    token of an activation); "tensor": all; "block": `SQUARE` x `SQUARE` of a weight, `SQUARE` channels of a token."""
    scale: Scale = "float32"
    rule: Rule = "rceil"
    """The rule of E8M0 scales."""
    planes: int = 0
    """Number of bit planes, each with a coefficient for each group; 0 for other formats."""

    @property
    def text(self) -> str:
        """The text that `format_of` parses into this format."""
        parts = [self.name]
        if self.share != FORMATS[self.name].share:
            parts.append(f"g{self.share}" if isinstance(self.share, int) else self.share)
        if self.asymmetric and not self.planes:
            parts.append("asym")
        if self.rule != "rceil":
            parts.append(self.rule)
        return ":".join(parts)

    @property
    def asymmetric(self) -> bool:
        """Whether the format has a zero point (for bit planes: a constant)."""
        return isinstance(self.grid, IntGrid) and self.grid.unsigned

    def group(self, channels: int) -> int:
        """Return the number of elements along `channels` input channels that share a scale.

        Raises:
            UserError: the number of channels is not a multiple of the group.
        """
        size = SQUARE if self.share == "block" else self.share if isinstance(self.share, int) else channels
        if channels % size:
            fits = [each for each in (256, 128, 64, 32, 16) if channels % each == 0]
            advice = f"for instance {' or '.join(f'g{each}' for each in fits)}" if fits else "row"
            raise UserError(
                f"{self.text} groups {size} input channels, but the layer has {channels}: use a group that divides"
                f" them, {advice}, or another format for this layer in the overrides"
            )
        return size

    def bits(self, rows: int, channels: int) -> float:
        """Return the stored bits per element of a weight, with its scales."""
        size = self.group(channels)
        groups = rows * channels / (size * (SQUARE if self.share == "block" else 1))
        groups = 1 if self.share == "tensor" else groups
        if self.planes:
            each = 16 * (self.planes + 1)
        else:
            each = (32 if self.scale == "float32" else 8) + (8 if self.asymmetric else 0)
        whole = 32 if self.scale == "e4m3" else 0
        return self.grid.bits + (groups * each + whole) / (rows * channels)


_E4M3 = FloatGrid(exponent_bits=4, mantissa_bits=3, largest=448.0)
_E2M3 = FloatGrid(exponent_bits=2, mantissa_bits=3, largest=7.5)
_E3M2 = FloatGrid(exponent_bits=3, mantissa_bits=2, largest=28.0)
_E2M1 = FloatGrid(exponent_bits=2, mantissa_bits=1, largest=6.0)


def _formats() -> dict[str, Format]:
    found = [Format(name=f"int{bits}", grid=IntGrid(bits=bits), share="row") for bits in range(2, 9)]
    found.append(Format(name="fp8", grid=_E4M3, share="row"))
    mx: dict[str, Grid] = {"mxfp8": _E4M3, "mxfp6": _E2M3, "mxfp6_e3m2": _E3M2, "mxfp4": _E2M1}
    mx |= {f"mxint{bits}": IntGrid(bits=bits) for bits in (8, 6, 4)}
    found += [Format(name=name, grid=grid, share=32, scale="e8m0") for name, grid in mx.items()]
    nv: dict[str, Grid] = {"nvfp4": _E2M1, "nvint4": IntGrid(bits=4)}
    found += [Format(name=name, grid=grid, share=16, scale="e4m3") for name, grid in nv.items()]
    found += [
        Format(name=f"bp{planes}", grid=IntGrid(bits=planes, unsigned=True), share=64, planes=planes)
        for planes in (2, 3, 4)
    ]
    return {each.name: each for each in found}


FORMATS: Mapping[str, Format] = _formats()
"""Name -> format with its usual sharing of scales: int2 ... int8 and fp8 (E4M3) with one float32 scale per row, the MX
formats (OCP Microscaling Formats v1.0) with a power of two for 32 elements, the NV formats with an E4M3 scale for 16
elements, and bp2, bp3, bp4 with bit planes (arXiv:2602.04163)."""


def format_of(text: str) -> Format:
    """Parse the name of a format: NAME, then parts after colons in any order.

    - `gN`, `row`, `token`, `tensor` or `block`: which elements share a scale (`token` is `row` for activations).
    - `asym`: with a zero point (int2 ... int8 only).
    - `floor`: the OCP rule for scales (MX formats only).

    Raises:
        UserError: the name or a part is unknown, or the format does not have it.

    >>> format_of("int4:g64").share, format_of("fp8:token").text, format_of("int2:g64:asym").asymmetric
    (64, 'fp8', True)
    """
    name, *parts = text.split(":") if isinstance(text, str) else [""]
    found = FORMATS.get(name)
    if found is None:
        raise UserError(
            f"the number format {shown(text)} is unknown.{did_you_mean(str(name), FORMATS)} Formats:"
            f" {', '.join(FORMATS)}, followed by parts such as :g64, :row, :token, :asym"
        )
    for part in parts:
        found = _with(found, part, text)
    return found


def _with(format: Format, part: str, text: str) -> Format:
    if match := re.fullmatch(r"g([1-9]\d{0,5})", part):
        return replace(format, share=int(match[1])) if format.scale == "float32" else _refused(format, part, text)
    if part in ("row", "token", "tensor") and format.scale == "float32" and not format.planes:
        return replace(format, share="tensor" if part == "tensor" else "row")
    if part == "block" and format.name == "fp8":
        return replace(format, share="block")
    if part == "asym" and isinstance(format.grid, IntGrid) and format.scale == "float32" and not format.planes:
        return replace(format, grid=IntGrid(bits=format.grid.bits, unsigned=True))
    if part in ("floor", "rceil") and format.scale == "e8m0":
        return replace(format, rule="floor" if part == "floor" else "rceil")
    return _refused(format, part, text)


def _refused(format: Format, part: str, text: str) -> Format:
    allowed = {
        "float32": "gN with a number N" if format.planes else "gN with a number N, row, token, tensor",
        "e8m0": "floor, rceil",
        "e4m3": "none",
    }[format.scale]
    if format.name.startswith("int"):
        allowed += ", asym"
    if format.name == "fp8":
        allowed += ", block"
    raise UserError(f"{shown(part)} in the number format {shown(text)} is not a part of {format.name}: {allowed}")
