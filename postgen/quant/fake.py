"""Linear layers that compute as their quantised form does, in floating point and with gradients.

A block is trained with such layers. What can be learned: the weight, clips relative to its range (learned weight
clipping, LWC, arXiv:2308.13137), its scales and zero points (LSQ, as in arXiv:2407.11062), a clip of the input's range
for each bin of noise levels (arXiv:2505.11497), and the equivalent transformation of inputs and weights (LET).
`FakeQuantLinear.quantized` returns the weight that the training found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from postgen.errors import UserError
from postgen.quant.formats import SQUARE, Format
from postgen.quant.gradients import clamped, fake_quantize, range_scales, through
from postgen.quant.rotation import check_rotation, rotated
from postgen.quant.rounding import Quantized, Scales, grouped, quantize_tensor, scales_of
from postgen.quant.spec import LayerSpec
from postgen.quant.step_bins import StepBins
from postgen.quant.transforms.let import LEAST_SCALE, FoldPoint, folded_input, folded_linear

Ranges = Literal["minmax", "lwc", "lsq"]
"""Where the scales of a weight come from: the range of the present weight, the range times learned factors, or learned
numbers that begin as the range."""

LWC_START = 4.0
"""First value of the parameters of LWC: the factors begin at sigmoid(4) = .98201."""
SCALES = (1e-6, 1e4)
"""Range of learned scales. EfficientQAT has 1e-4 as the smallest, which is more than 8-bit weights need."""
ACT_CLIP_START = 0.95
"""First value of learned clips of inputs (QVGen's)."""


class Let(nn.Module):
    """The learned scales and shifts of one tensor x of a block, which becomes (x - shift) / scale.

    Args:
        point: the tensor.
        scale: (C,) first values of the scales, not 0.
        shift: (C,) first values of the shifts; None for no shifts.
    """

    def __init__(self, point: FoldPoint, scale: Tensor, shift: Tensor | None = None) -> None:
        super().__init__()
        self.point = point
        self.let_scale = nn.Parameter(scale.detach().float().clone())
        self.let_shift = None if shift is None else nn.Parameter(shift.detach().float().clone())

    @property
    def values(self) -> tuple[Tensor, Tensor | None]:
        """Scale and shift in use; the scales are at least `LEAST_SCALE`."""
        return clamped(self.let_scale, LEAST_SCALE, math.inf), self.let_shift


class FakeQuantLinear(nn.Linear):
    """A linear layer with a quantised weight and a quantised input, in floating point.

    The output is that of the exact layer, up to the quantisation: what a transformation changes in the input and in
    the output is undone, so a block with such layers computes what it computes after the transformations are folded.

    Args:
        linear: the exact layer. Its weight and bias are copied in float32.
        spec: how it is quantised.
        name: name of the layer inside its block, for the transformations.
        ranges: see `Ranges`.
        lets: transformations of tensors that the layer reads or writes.
        bins: bins of noise levels, each with a learned clip of the input's range; None for no clip.
        branch: matrices (out, rank) and (rank, in) of an exact branch, whose product is subtracted from the weight.

    Raises:
        UserError: the group of a format or the rotation does not divide the channels, or the format has no such
            ranges.
    """

    def __init__(
        self,
        linear: nn.Linear,
        spec: LayerSpec,
        *,
        name: str = "",
        ranges: Ranges = "minmax",
        lets: Sequence[Let] = (),
        bins: StepBins | None = None,
        branch: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        check_rotation(spec.rotate, linear.in_features)
        self.spec, self.name, self.ranges, self.bins = spec, name, ranges, bins
        self.lets = nn.ModuleList(lets)
        self.weight = nn.Parameter(linear.weight.detach().float().clone())
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().float().clone())
        self.branch = None
        if branch is not None:
            self.branch = nn.ParameterList(each.detach().float() for each in branch)
            with torch.no_grad():
                self.weight.sub_(self.branch[0] @ self.branch[1])
        if bins is not None and spec.act is not None:
            self.act_clip = nn.Parameter(torch.full((bins.count,), ACT_CLIP_START, device=self.weight.device))
        self.channel_scale: Tensor | None
        self.channel_zero: Tensor | None
        self.by_channel_(None)
        self._known: Quantized | None = None
        self._fixed: tuple[Tensor, Tensor | None] | None = None
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
            scales = scales_of(grouped(self.folded()[0], format), format)
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

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias after the transformations and the rotation; the weight is without the branch."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        for let in self.lets_of():
            weight, bias = folded_linear(let.point, self.name, weight, bias, *let.values)
        return rotated(weight, self.spec.rotate), bias

    def scales(self, weight: Tensor) -> Scales | None:
        """Return the present scales for the folded weight, with gradients; None for bit planes."""
        format = self.spec.weight
        assert format is not None
        if format.planes:
            return None
        if self.ranges == "lsq":
            zero: Tensor | None = self.zero
            if zero is not None:
                zero = through(zero, zero.clamp(format.grid.least, format.grid.largest).round())
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
        (weight, _), format = self.folded(), self.spec.weight
        if self.ranges == "lsq" or format.planes:
            return quantize_tensor(weight, format, self.scales(weight))
        # `scales_of` keeps the two factors of E4M3 scales apart.
        clips: dict[str, Any] = {}
        if self.ranges == "lwc":
            clips = {"clip": self.clip_high.sigmoid()}
            clips["clip_low"] = None if self.clip_low is None else self.clip_low.sigmoid()
        return quantize_tensor(weight, format, scales_of(grouped(weight, format), format, **clips))

    @torch.no_grad()
    def fix_(self, quantized: Quantized | None = None) -> None:
        """Keep this quantised weight from now on (None: the present one), and compute its numbers only once.

        Args:
            quantized: a weight in the folded form.
        """
        self._known = self.quantized() if quantized is None else quantized
        weight, bias = self.folded()
        self._fixed = (weight if self._known is None else self._known.numbers()), bias

    def numbers(self, folded: Tensor) -> Tensor:
        """Return the folded weight as its codes represent it, float32 (N, K), with gradients."""
        format = self.spec.weight
        if format is None:
            return folded
        if format.planes:
            return quantize_tensor(folded.detach(), format).numbers()
        return fake_quantize(folded, format, self.scales(folded))

    def transformed(self, x: Tensor) -> Tensor:
        """Return the input after the transformations and the rotation, before it is quantised; float32."""
        x = x.float()
        for let in self.lets_of():
            x = folded_input(let.point, self.name, x, *let.values)
        return rotated(x, self.spec.rotate)

    def read(self, x: Tensor) -> Tensor:
        """Return the input as the layer multiplies it: transformed, rotated and quantised; float32."""
        x = self.transformed(x)
        if self.spec.act is None:
            return x
        if self.channel_scale is not None and self.channel_zero is not None:
            return self._by_channel(x, self.channel_scale, self.channel_zero)
        # Scales have one more axis than x, for the groups.
        clip = 1.0 if self.bins is None else self.bins.pick(clamped(self.act_clip, 0.0, 1.0), x[..., None])
        return fake_quantize(x, of_inputs(self.spec.act), clip=clip)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x (..., K), in the dtype of x, or in that of autocast."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        # Scales, transformations and rotations need float32; the product has the dtype of x, as in `QLinear`.
        with torch.autocast(device, enabled=False):
            if self._fixed is not None:
                weight, bias = self._fixed
            else:
                folded, bias = self.folded()
                weight = self.numbers(folded)
            bias = None if bias is None else bias.to(x.dtype)
            y = self._undone(functional.linear(self.read(x).to(x.dtype), weight.to(x.dtype), bias))
            if self.branch is not None:
                up, down = (each.to(x.dtype) for each in self.branch)
                y = y + functional.linear(functional.linear(x, down), up)
            return y.to(x.dtype)

    def lets_of(self) -> Iterator[Let]:
        """Yield the transformations of tensors that the layer reads or writes."""
        for let in self.lets:
            assert isinstance(let, Let)
            yield let

    def _undone(self, y: Tensor) -> Tensor:
        """Return the output without the transformations of tensors that the layer writes."""
        for let in self.lets_of():
            scale, shift = let.values
            for part in let.point.writers:
                if part.name == self.name:
                    inside = y[..., part.start : part.stop] * (1 / scale if part.inverse else scale)
                    inside = inside if shift is None or not part.shifts else inside + shift
                    y = torch.cat([y[..., : part.start], inside, y[..., part.stop :]], -1)
        return y

    @torch.no_grad()
    def folded_branch(self) -> tuple[tuple[Tensor, Tensor], Tensor | None] | None:
        """Return the branch (out, rank), (rank, in) after the transformations, and the bias of the layer with it.

        None if there is no branch.
        """
        if self.branch is None:
            return None
        up, down = self.branch
        factors, weight = torch.ones_like(self.weight), self.weight + up @ down
        bias: Tensor | None = self.bias
        for let in self.lets_of():
            factors, _ = folded_linear(let.point, self.name, factors, None, *let.values)
            weight, bias = folded_linear(let.point, self.name, weight, bias, *let.values)
        # The factors are an outer product: those of the rows times those of the columns.
        return (up * factors[:, :1], down * (factors[:1] / factors[:1, :1])), bias

    def by_channel_(self, scales: Scales | None) -> None:
        """Quantise the input with fixed scales and zero points (K,) for each channel (SOS, arXiv:2311.10126); None
        ends this.
        """
        self.register_buffer("channel_scale", None if scales is None else scales.scale)
        self.register_buffer("channel_zero", None if scales is None else scales.zero)

    def _by_channel(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        assert self.spec.act is not None
        scaled = x / scale
        codes = (through(scaled, scaled.round()) + zero).clamp(0, 2.0**self.spec.act.grid.bits - 1)
        return (codes - zero) * scale

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


def of_inputs(format: Format) -> Format:
    """Return a format as it applies to inputs: the squares of "fp8:block" are groups of channels of a token."""
    return replace(format, share=SQUARE) if format.share == "block" else format
