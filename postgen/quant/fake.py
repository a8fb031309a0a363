"""Linear layers that compute as their quantised form does, in floating point and with gradients.

A block is trained with such layers. What can be learned: the weight, clips relative to its range (learned weight
clipping, LWC, arXiv:2308.13137), its scales and zero points (LSQ, as in arXiv:2407.11062), a clip of the input's range
for each bin of noise levels (arXiv:2505.11497), and the equivalent transformation of inputs and weights (LET).
`FakeQuantLinear.quantized` returns the weight that the training found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from postgen.errors import UserError
from postgen.quant.formats import Format
from postgen.quant.gradients import clamped, fake_quantize, range_scales, through
from postgen.quant.rounding import Quantized, Scales, grouped, quantize, scales_of
from postgen.quant.spec import LayerSpec
from postgen.quant.step_bins import StepBins

Ranges = Literal["minmax", "lwc", "lsq"]
"""Where the scales of a weight come from: the range of the present weight, the range times learned factors, or learned
numbers that begin as the range."""

LWC_START = 4.0
"""First value of the parameters of LWC: the factors begin at sigmoid(4) = .98201."""
SCALES, ZEROS = (1e-6, 1e4), (-1e4, 1e4)
"""Ranges of learned scales and zero points. EfficientQAT has 1e-4 as the smallest scale, which is more than 8-bit
weights need, and 0 as the smallest zero point, with which a group without a negative number would begin with a larger
error than rounding to nearest."""
LEAST_SHIFTED = 1e-2
"""Smallest absolute value of a scale of LET (OmniQuant's)."""
ACT_CLIP_START = 0.95
"""First value of learned clips of inputs (QVGen's)."""


class Let(nn.Module):
    """The equivalent transformation of one tensor x, which some layers read: they get (x - shift) / scale.

    Args:
        scale: (C,) first values of the scales, not 0.
        shift: (C,) first values of the shifts; None for no shifts.
    """

    def __init__(self, scale: Tensor, shift: Tensor | None = None) -> None:
        super().__init__()
        self.let_scale = nn.Parameter(scale.detach().float().clone())
        self.let_shift = None if shift is None else nn.Parameter(shift.detach().float().clone())

    @property
    def scale(self) -> Tensor:
        """The scales in use, whose absolute value is at least `LEAST_SHIFTED`."""
        raw = self.let_scale
        return through(raw, torch.where(raw < 0, raw.clamp_max(-LEAST_SHIFTED), raw.clamp_min(LEAST_SHIFTED)))

    def forward(self, x: Tensor) -> Tensor:
        """Return (x - shift) / scale."""
        return (x if self.let_shift is None else x - self.let_shift) / self.scale


class FakeQuantLinear(nn.Linear):
    """A linear layer with a quantised weight and a quantised input, in floating point.

    The output is that of the exact layer, up to the quantisation: transformations of input and output are undone.

    Args:
        linear: the exact layer. Its weight and bias are copied in float32.
        spec: how it is quantised.
        ranges: see `Ranges`.
        bins: bins of noise levels, each with a learned clip of the input's range; None for no clip.
        let_in: transformation of the input.
        let_out: transformation of the output, whose consumers read it; the rows of the weight are divided by its scale
            before the weight is quantised.
        branch: matrices (rank, in) and (out, rank) of an exact branch whose product is subtracted from the weight.
        turn: rotation of the channels of an input or weight (..., K), orthonormal; None for no rotation.

    Raises:
        UserError: the group of a format does not divide the channels, or the format has no such ranges.
    """

    def __init__(
        self,
        linear: nn.Linear,
        spec: LayerSpec,
        *,
        ranges: Ranges = "minmax",
        bins: StepBins | None = None,
        let_in: Let | None = None,
        let_out: Let | None = None,
        branch: tuple[Tensor, Tensor] | None = None,
        turn: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.spec, self.ranges, self.turn, self.bins = spec, ranges, turn, bins
        self.weight = nn.Parameter(linear.weight.detach().float().clone())
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().float().clone(), requires_grad=False)
        self.let_in, self.let_out = let_in, let_out
        self.branch = None
        if branch is not None:
            self.branch = nn.ParameterList([nn.Parameter(each.detach().float(), False) for each in branch])
            with torch.no_grad():
                self.weight -= branch[1].float() @ branch[0].float()
        if bins is not None and spec.act is not None:
            place = self.weight.device
            self.act_clip = nn.Parameter(torch.full((bins.count,), ACT_CLIP_START, device=place))
        self.channels: Scales | None = None
        self._known: Quantized | None = None
        self._numbers: Tensor | None = None
        if spec.weight is not None:
            self._add_ranges(spec.weight)

    def _add_ranges(self, format: Format) -> None:
        if self.ranges == "minmax":
            format.group(self.in_features)  # checks that the group divides the channels
            return
        if format.planes:
            raise UserError(
                f"{format.text} has no range to train: use the recipe bpdq for bit planes, or an integer format"
            )
        with torch.no_grad():
            scales = scales_of(grouped(self.folded(), format), format)
        if self.ranges == "lwc":
            self.clip_high = nn.Parameter(torch.full_like(scales.scale, LWC_START))
            self.clip_low = None if scales.zero is None else nn.Parameter(torch.full_like(scales.scale, LWC_START))
            return
        if format.scale != "float32":
            raise UserError(
                f"the scales of {format.text} are powers of two or E4M3 numbers and cannot be trained: use the recipe"
                " omniquant, or a format such as int4:g32"
            )
        self.scale = nn.Parameter(scales.scale)
        self.zero = None if scales.zero is None else nn.Parameter(scales.zero)

    @property
    def out_scale(self) -> Tensor | None:
        """Scales of the output (N, 1) by which the rows of the weight are divided, or None."""
        return None if self.let_out is None else self.let_out.scale[:, None]

    def folded(self) -> Tensor:
        """Return the weight that is quantised: with transformations and rotation, without the exact branch."""
        weight = self.weight
        if self.let_in is not None:
            weight = weight * self.let_in.scale
        if self.out_scale is not None:
            weight = weight / self.out_scale
        return weight if self.turn is None else self.turn(weight)

    def scales(self, weight: Tensor) -> Scales | None:
        """Return the present scales for the folded weight, with gradients; None for bit planes."""
        format = self.spec.weight
        assert format is not None
        if format.planes:
            return None
        if self.ranges == "lsq":
            zero = None if self.zero is None else through(self.zero, self.zero.clamp(*ZEROS).round())
            return Scales(scale=clamped(self.scale, *SCALES), zero=zero)
        if self.ranges == "lwc":
            low = None if self.clip_low is None else self.clip_low.sigmoid()
            return range_scales(grouped(weight, format), format, self.clip_high.sigmoid(), low)
        return range_scales(grouped(weight, format), format)

    @torch.no_grad()
    def quantized(self) -> Quantized | None:
        """Return the quantised weight that the layer computes with, in the folded form; None if it is exact."""
        if self.spec.weight is None:
            return None
        if self._known is not None:
            return self._known
        weight, format = self.folded(), self.spec.weight
        if self.ranges == "lsq" or format.planes:
            return quantize(weight, format, self.scales(weight))
        # `scales_of` keeps the two factors of E4M3 scales apart.
        clips: dict[str, Any] = {}
        if self.ranges == "lwc":
            clips = {"clip": self.clip_high.sigmoid()}
            clips["clip_low"] = None if self.clip_low is None else self.clip_low.sigmoid()
        return quantize(weight, format, scales_of(grouped(weight, format), format, **clips))

    @torch.no_grad()
    def fix_(self, quantized: Quantized | None = None) -> None:
        """Keep this quantised weight from now on (None: the present one), and compute its numbers only once.

        Args:
            quantized: a weight in the folded form.
        """
        self._known = self.quantized() if quantized is None else quantized
        self._numbers = None if self._known is None else self._known.numbers()

    def numbers(self) -> Tensor:
        """Return the folded weight as its codes represent it, float32 (N, K), with gradients unless it is fixed."""
        if self._numbers is not None:
            return self._numbers
        weight, format = self.folded(), self.spec.weight
        if format is None:
            return weight
        if format.planes:
            known = self.quantized()
            assert known is not None
            return known.numbers()
        return fake_quantize(weight, format, self.scales(weight))

    def offset(self) -> Tensor | None:
        """Return the bias, plus what the input's shift adds to the output; None if there is neither."""
        if self.let_in is None or self.let_in.let_shift is None:
            return self.bias
        shift = self.weight @ self.let_in.let_shift
        return shift if self.bias is None else self.bias + shift

    def read(self, x: Tensor) -> Tensor:
        """Return the input as the layer multiplies it: transformed, rotated and quantised."""
        if self.let_in is not None:
            x = self.let_in(x.float()).to(x.dtype)
        if self.turn is not None:
            x = self.turn(x)
        if self.spec.act is None:
            return x
        if self.channels is not None:
            return self._by_channel(x, self.channels)
        # Scales have one more axis than x, for the groups.
        clip = 1.0 if self.bins is None else self.bins.pick(clamped(self.act_clip, 0.0, 1.0), x[..., None])
        return fake_quantize(x, self.spec.act, clip=clip)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x (..., K)."""
        y = functional.linear(self.read(x), self.numbers().to(x.dtype))
        if self.out_scale is not None:
            y = y * self.out_scale.flatten()
        if self.branch is not None:
            down, up = self.branch
            y = y + functional.linear(functional.linear(x, down.to(x.dtype)), up.to(x.dtype))
        offset = self.offset()
        return (y if offset is None else y + offset).to(x.dtype)

    def by_channel_(self, scales: Scales | None) -> None:
        """Quantise the input with fixed scales and zero points (K,) for each channel (SOS, arXiv:2311.10126); None
        ends this.
        """
        self.channels = scales

    def _by_channel(self, x: Tensor, scales: Scales) -> Tensor:
        assert scales.zero is not None
        assert self.spec.act is not None
        most = 2.0**self.spec.act.grid.bits - 1
        scaled = x.float() / scales.scale
        codes = (through(scaled, scaled.round()) + scales.zero).clamp(0, most)
        return ((codes - scales.zero) * scales.scale).to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the layer."""
        texts = {"weight": self.spec.weight, "act": self.spec.act}
        said = [f"{key}={each.text}" for key, each in texts.items() if each is not None]
        return ", ".join([super().extra_repr(), *said, *([self.ranges] if self.ranges != "minmax" else [])])


def fake_layers(module: nn.Module) -> Iterator[tuple[str, FakeQuantLinear]]:
    """Yield the layers of this kind inside a module, with their names."""
    for name, inside in module.named_modules():
        if isinstance(inside, FakeQuantLinear):
            yield name, inside
