"""Which number format suits a tensor: integers or floating point, with or without rotation (arXiv:2510.25602).

The crest factor of a group is k = max|x| / rms(x). Integers have even steps and suit small crest factors;
floating-point numbers suit large ones. With r = used scale / (max|x| / largest number of the grid), the
signal-to-noise ratio of b-bit integers for normally distributed numbers, in dB, is

    4.78 + 6.02 b - 20 log10(r k)               (+ 10 log10(g / (g - 1)) if the maximum of g numbers is exact)

and that of floating-point numbers with M mantissa bits, exponent bias B and the largest number Q is

    -10 log10( w_n / (24 4^M) + 2^(2 (1 - B - M)) (r k)^2 p_s / (12 Q^2) + w_0 )

where w_n is the share of the energy in normal numbers, p_s the share of subnormal numbers, and w_0 the share of the
energy that is rounded to 0.

    for advice in advise({"ffn": linear}, {"ffn": {0: x}}):
        print(advice)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.quant.formats import Format, format_of
from postgen.quant.grids import FloatGrid
from postgen.quant.rotation import rotated
from postgen.quant.rounding import grouped, qsnr, quantize_tensor

PAIRS: tuple[tuple[str, str], ...] = (
    ("int8", "fp8"),
    ("mxint8", "mxfp8"),
    ("mxint6", "mxfp6"),
    ("mxint4", "mxfp4"),
    ("nvint4", "nvfp4"),
)
"""Pairs of formats with as many bits each: integers, and floating point."""
FORMATS_TRIED = tuple(name for pair in PAIRS for name in pair)
"""The formats of `PAIRS`."""
QUANTILES = (0.25, 0.5, 0.75, 0.99)
"""Quantiles of the crest factor in a report."""
_RATIO = {"float32": 1.0, "e8m0": 1.5, "e4m3": 1.05}
"""Number format of the scales -> usual ratio r of the used to the ideal scale."""


def crest_factor(x: Tensor, format: Format) -> Tensor:
    """Return max|x| / rms(x) of each group of a tensor that shares a scale, flat; groups of zeros are left out.

    Args:
        x: a weight (N, K) or activations (..., K).
        format: the format, whose groups are used.

    Raises:
        UserError: the format's group does not divide K.
    """
    groups = grouped(x, format)
    groups = groups.flatten()[None] if format.share == "tensor" else groups.flatten(0, -2)
    size = groups.square().mean(-1).sqrt()
    return (groups.abs().amax(-1) / size)[size > 0]


def expected_noise(format: Format, crest: Tensor, group: int) -> Tensor:
    """Return the expected squared error, relative to the squared numbers, of groups with the given crest factors.

    Args:
        format: a symmetric integer format or a floating-point format.
        crest: crest factors, any shape.
        group: numbers in a group, `format.group(K)`.

    Raises:
        UserError: the format has a zero point or bit planes.
    """
    if format.asymmetric:
        raise UserError(f"{format.text} has a zero point, for which there is no formula: use a symmetric format")
    k, ratio = crest.double(), _RATIO[format.scale]
    if group == 1 and format.scale != "e8m0":
        return torch.zeros_like(k)  # each number is the maximum of its group
    if not isinstance(format.grid, FloatGrid):
        # The formula as published is rounded. The published crossovers are those of the rounded numbers for E8M0
        # scales, and of the exact ones for E4M3 scales; they differ by .007 dB.
        even = 4.78 + 6.02 * format.grid.bits
        if format.scale != "e8m0":
            even = 10 * math.log10(3) + 20 * math.log10(2) * format.grid.bits + 10 * math.log10(group / (group - 1))
        found: Tensor = 10.0 ** (-even / 10) * (ratio * k).square()
        return found
    grid = format.grid
    bias, mantissa, largest = grid.bias, grid.mantissa_bits, grid.largest
    zero, normal = (ratio * k / largest * 2.0**power for power in (-bias - mantissa, 1 - bias))
    in_normal = 2 * (normal * _density(normal) + 1 - _below(normal))
    if format.scale != "e8m0":
        in_normal = (in_normal - k.square() / group).clamp_min(0)  # the maximum is exact
    subnormal = 2 * (_below(normal) - _below(zero))
    lost = 2 * _below(zero) - 1 - 2 * zero * _density(zero)
    step = 2.0 ** (2 * (1 - bias - mantissa)) / (12 * largest**2)
    return in_normal / (24 * 4.0**mantissa) + step * (ratio * k).square() * subnormal + lost


def expected_qsnr(format: Format, crest: float, group: int | None = None) -> float:
    """Return the expected signal-to-noise ratio of groups with a crest factor, in dB.

    Args:
        format: a symmetric integer format or a floating-point format.
        crest: the crest factor, above 0.
        group: numbers in a group; None is the format's own number.

    Raises:
        UserError: the format has a zero point or bit planes, or its groups are rows and `group` is None.
    """
    noise = expected_noise(format, torch.tensor(crest), _group(format, group))
    return float(-10 * noise.log10())


def crossover(integers: Format, floating: Format, group: int | None = None) -> float:
    """Return the crest factor below which integers have less error than floating-point numbers; inf if always.

    Args:
        integers: a symmetric integer format.
        floating: a floating-point format.
        group: numbers in a group; None is the format's own number.

    Raises:
        UserError: as in `expected_qsnr`.
    """
    low, high = 1.0, 1000.0
    if expected_qsnr(integers, high, group) > expected_qsnr(floating, high, group):
        return math.inf
    for _ in range(60):
        middle = (low + high) / 2
        if expected_qsnr(integers, middle, group) > expected_qsnr(floating, middle, group):
            low = middle
        else:
            high = middle
    return low


def gap_by_crest(x: Tensor, integers: Format, floating: Format, parts: int = 32) -> tuple[Tensor, Tensor]:
    """Measure by how much integers have less error than floating-point numbers, for groups of similar crest factors.

    Args:
        x: a weight (N, K) or activations (..., K), as large as possible.
        integers: an integer format.
        floating: a floating-point format with the same groups.
        parts: number of parts into which the groups are sorted by their crest factors.

    Returns:
        Crest factors (geometric means) and gaps in dB (positive: integers have less error), both (parts), ascending
        in the crest factor.

    Raises:
        UserError: the groups differ or do not divide K, or there are fewer groups than parts.
    """
    if integers.group(x.shape[-1]) != floating.group(x.shape[-1]):
        raise UserError(f"{integers.text} and {floating.text} have groups of different sizes: give two with the same")
    groups = grouped(x, integers).flatten(0, -2)
    energy = groups.square().sum(-1)
    used, crest = energy > 0, crest_factor(x, integers)
    if len(crest) < parts:
        raise UserError(f"x has {len(crest)} groups that are not 0, too few for {parts} parts: give more numbers")
    noises = []
    for format in (integers, floating):
        wrong = (groups - grouped(quantize_tensor(x, format).numbers(), format).flatten(0, -2)).square().sum(-1)
        noises.append((wrong / energy)[used])
    sorted_parts = crest.argsort().tensor_split(parts)
    of_parts = [[each[part].double().mean() for part in sorted_parts] for each in (crest.log(), *noises)]
    logs, ours, theirs = (torch.stack(each) for each in of_parts)
    return logs.exp(), 10 * (theirs / ours).log10()


def measured_crossover(x: Tensor, integers: Format, floating: Format, parts: int = 32) -> float:
    """Return the crest factor of a tensor's groups above which floating-point numbers have less error.

    For 4 bits it is below `crossover`, because the formula counts 8 positive integers and there are 7.

    Args:
        x: as in `gap_by_crest`, and so are the others.
        integers: an integer format.
        floating: a floating-point format with the same groups.
        parts: number of parts.

    Returns:
        The crest factor; inf if integers win in all parts, 0 if floating-point numbers do.

    Raises:
        UserError: as in `gap_by_crest`.
    """
    crest, gap = gap_by_crest(x, integers, floating, parts)
    wins = (gap > 0).nonzero()
    if not len(wins):
        return 0.0
    last = int(wins[-1])
    if last == parts - 1:
        return math.inf
    share = gap[last] / (gap[last] - gap[last + 1])
    return float(crest[last] + share * (crest[last + 1] - crest[last]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How one number format, with or without rotation, suits one tensor."""

    format: str
    rotate: int
    """Channels of a Hadamard block; 0: no rotation."""
    crest: tuple[float, ...]
    """Crest factors of the groups at `QUANTILES`."""
    expected: float
    """QSNR that the formula gives for the groups' crest factors, in dB."""
    measured: float
    """QSNR of rounding the tensor to nearest, in dB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """The formats that suit one linear layer. `print` shows a table."""

    layer: str
    weight: tuple[Fit, ...]
    inputs: Mapping[Hashable, tuple[Fit, ...]]
    """Bin -> how the formats suit the inputs of this bin, in the order of `weight`."""

    def best(self, formats: Sequence[str] | None = None) -> tuple[str, int, float]:
        """Return the best format for weight and input, its rotation, and the QSNR of the output that it gives, in dB.

        The errors of weight and input add up; those of the bins are averaged. Rotation is common to weight and input.

        Args:
            formats: texts of the formats to choose from; None for all.

        Raises:
            UserError: none of the formats was tried.
        """
        found = [
            (each.format, each.rotate, self._output(place))
            for place, each in enumerate(self.weight)
            if formats is None or each.format in formats
        ]
        if not found:
            tried = ", ".join(dict.fromkeys(each.format for each in self.weight))
            raise UserError(
                f"of {', '.join(formats or ())} none was tried for {self.layer}, only {tried}: choose among these, or"
                " give advise(..., formats=...) others"
            )
        return max(found, key=lambda each: each[2])

    def _output(self, place: int) -> float:
        noise = 10 ** (-self.weight[place].measured / 10)
        if self.inputs:
            noise += sum(10 ** (-fits[place].measured / 10) for fits in self.inputs.values()) / len(self.inputs)
        return math.inf if noise == 0 else -10 * math.log10(noise)

    def __str__(self) -> str:
        lines = [f"{self.layer}", f"{'format':12}{'rotate':>7}{'weight':>19}{'inputs':>19}{'output dB':>11}"]
        lines[0] += ": median crest factor and dB; inputs of the worst bin"
        for place, each in enumerate(self.weight):
            worst = min((fits[place] for fits in self.inputs.values()), key=lambda fit: fit.measured, default=None)
            parts = [f"{fit.crest[1]:9.2f}{fit.measured:10.2f}" if fit else f"{'':19}" for fit in (each, worst)]
            lines.append(f"{each.format:12}{each.rotate:7}{''.join(parts)}{self._output(place):11.2f}")
        return "\n".join(lines)


def fits_of(x: Tensor, formats: Sequence[str], rotations: Sequence[int]) -> tuple[Fit, ...]:
    """Return how each format suits a tensor with each rotation; pairs whose blocks do not divide K are left out.

    Args:
        x: a weight (N, K) or activations (..., K).
        formats: texts of formats, see `format_of`.
        rotations: sizes of Hadamard blocks; 0 is no rotation.

    Raises:
        UserError: a format is unknown or has a zero point, or none fits.
    """
    found = []
    for size in rotations:
        if size and x.shape[-1] % size:
            continue
        turned = rotated(x, size)
        for text in formats:
            format = format_of(text)
            if isinstance(format.share, int) and x.shape[-1] % format.share:
                continue
            found.append(_fit(turned, format, size))
    if not found:
        raise UserError(
            f"none of the formats {', '.join(formats)} divides {x.shape[-1]} channels: try one such as int8 or fp8,"
            " whose groups are rows"
        )
    return tuple(found)


def advise(
    layers: Mapping[str, nn.Linear],
    inputs: Mapping[str, Mapping[Hashable, Tensor]] | None = None,
    *,
    formats: Sequence[str] = FORMATS_TRIED,
    rotations: Sequence[int] = (0, 16),
) -> list[Advice]:
    """Return which formats suit each layer, from its weight and samples of its inputs.

    Args:
        layers: full name -> linear layer.
        inputs: full name -> bin -> inputs (..., K); layers without inputs are judged by their weights.
        formats: texts of the formats to try for weight and input; those that do not fit a layer are left out.
        rotations: sizes of Hadamard blocks to try; 0 is no rotation.

    Raises:
        UserError: a format is unknown or has a zero point, none fits a layer, or inputs have another number of
            channels.
    """
    found = []
    for name, layer in layers.items():
        seen = (inputs or {}).get(name, {})
        for bin, x in seen.items():
            if x.shape[-1] != layer.in_features:
                size = f"{x.shape[-1]} channels, but the layer has {layer.in_features}"
                raise UserError(f"the inputs of {name} in bin {bin!r} have {size}")
        found.append(
            Advice(
                layer=name,
                weight=fits_of(layer.weight.detach(), formats, rotations),
                inputs={bin: fits_of(x.detach(), formats, rotations) for bin, x in seen.items()},
            )
        )
    return found


def _fit(x: Tensor, format: Format, rotate: int) -> Fit:
    crest = crest_factor(x, format)
    if not len(crest):  # all zeros, which every format represents
        ones = (1.0,) * len(QUANTILES)
        return Fit(format=format.text, rotate=rotate, crest=ones, expected=math.inf, measured=math.inf)
    groups = grouped(x, format)
    energy = groups.double().square().sum(-1).flatten()
    energy = energy.sum()[None] if format.share == "tensor" else energy[energy > 0]
    noise = expected_noise(format, crest, format.group(x.shape[-1]))
    expected = -10 * ((noise * energy).sum() / energy.sum()).log10()
    # torch.quantile takes at most 2^24 numbers.
    some = crest[:: len(crest) // 2**22 + 1]
    at = some.quantile(torch.tensor(QUANTILES, device=crest.device))
    return Fit(
        format=format.text,
        rotate=rotate,
        crest=tuple(at.tolist()),
        expected=float(expected),
        measured=qsnr(x, quantize_tensor(x, format).numbers()),
    )


def _group(format: Format, group: int | None) -> int:
    if group is not None:
        return group
    if not isinstance(format.share, int):
        raise UserError(f"the groups of {format.text} are rows, so their size must be given")
    return format.share


def _density(x: Tensor) -> Tensor:
    return (-x.square() / 2).exp() / math.sqrt(2 * math.pi)


def _below(x: Tensor) -> Tensor:
    found: Tensor = torch.special.ndtr(x)
    return found
