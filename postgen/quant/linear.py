"""A linear layer with a quantised weight, whose input is quantised in every call.

    x' = x / input_scale            channels that were scaled up in the weight (1 where nothing was scaled)
    y = Q(clip, x' R) W^T + bias + up (down x')

W is the weight of the rotated channels, stored in bits (`packing`); R rotates blocks of channels (`rotation`), Q
rounds the input to its format with scales from its range times clip (1, or a number for each bin of the noise level),
and up, down are an exact low-rank branch (arXiv:2411.05007).
Gradients ignore Q (straight-through), so LoRA on top of the layer trains.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from postgen.errors import UserError, shown
from postgen.families.shared_rows import shared_rows
from postgen.kernels.fp8 import E4M3
from postgen.quant.formats import Format
from postgen.quant.packing import bits_dtype, bits_shape, layout, pack, unpack
from postgen.quant.products import (
    Mode,
    Rows,
    blocks_product,
    eight_bits,
    expanded,
    input_rows,
    mode_for,
    modes,
    rounded,
    rows_product,
)
from postgen.quant.rotation import check_rotation, rotated, rotated_back
from postgen.quant.rounding import Quantized
from postgen.quant.spec import LayerSpec
from postgen.quant.step_bins import StepBins

PACKED = ("weight", "weight_scale", "weight_zero", "weight_whole")
"""Names of the tensors of a packed weight in a layer."""


class QLinear(nn.Linear):
    """A linear layer with a quantised weight. `QLinear.of` makes one from a linear layer.

    The parameter `weight` and the buffers `weight_scale`, `weight_zero`, `weight_whole`, `input_scale`, `signs` and
    `act_clip` hold bits as integers, so no library casts them. A weight that stays exact is an ordinary parameter.
    """

    weight_scale: Tensor | None
    weight_zero: Tensor | None
    weight_whole: Tensor | None
    input_scale: Tensor | None
    signs: Tensor | None
    act_clip: Tensor | None
    branch_up: nn.Parameter | None
    branch_down: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: LayerSpec,
        *,
        bias: bool = True,
        input_scale: bool = False,
        signs: bool = False,
        clips: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer with tensors of the right shapes and dtypes, whose values are not set.

        Args:
            in_features: number K of input channels.
            out_features: number N of output channels.
            spec: how the layer is quantised.
            bias: whether the layer has a bias.
            input_scale: whether the input is divided by a scale of each channel.
            signs: whether the rotation flips signs of channels.
            clips: number of bins of the noise level that clip the range of the input; 0: none.
            device: device of the tensors.
            dtype: dtype of the bias, the low-rank branch, and a weight that stays exact.

        Raises:
            UserError: the formats or the rotation do not fit the number of channels, or nothing is quantised.
        """
        check_spec(spec, in_features)
        super().__init__(in_features, out_features, bias=bias, device="meta", dtype=dtype)
        self.spec = spec
        self.bins: StepBins | None = None
        self.shares_input = False  # whether the layers that run next read the same tensor
        self._forced: Mode | None = None

        def empty(*shape: int, kind: torch.dtype | None = dtype) -> Tensor:
            return torch.empty(shape, device=device, dtype=kind)

        def frozen(*shape: int) -> nn.Parameter:
            return nn.Parameter(empty(*shape), requires_grad=False)

        bits = {} if spec.weight is None else layout(spec.weight, (out_features, in_features))
        stored = {name: empty(*bits_shape(shape, kind), kind=bits_dtype(kind)) for name, (shape, kind) in bits.items()}
        self.weight = nn.Parameter(stored.get("weight", empty(out_features, in_features)), requires_grad=False)
        for name in PACKED[1:]:
            self.register_buffer(name, stored.get(name))
        self.register_buffer("input_scale", empty(in_features, kind=torch.int32) if input_scale else None)
        self.register_buffer("signs", empty(in_features, kind=torch.int8) if signs else None)
        self.register_buffer("act_clip", empty(clips, kind=torch.int32) if clips else None)
        self.bias = frozen(out_features) if bias else None  # type: ignore[assignment]
        self.branch_up = frozen(out_features, spec.rank) if spec.rank else None
        self.branch_down = frozen(spec.rank, in_features) if spec.rank else None
        self.register_load_state_dict_pre_hook(_take_zero)  # type: ignore[no-untyped-call]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        linear: nn.Linear,
        quantized: Quantized | None,
        spec: LayerSpec,
        *,
        branch: tuple[Tensor, Tensor] | None = None,
        input_scale: Tensor | None = None,
        signs: Tensor | None = None,
        clip: tuple[StepBins, Tensor] | None = None,
    ) -> Self:
        """Make the quantised layer of a linear layer.

        Args:
            linear: the layer, which gives the bias, and the weight if it stays exact.
            quantized: the quantised weight (N, K), after the branch was subtracted, its channels were scaled and then
                rotated; None if the spec keeps the weight exact.
            spec: how the layer is quantised; its rank becomes that of the branch.
            branch: the low-rank branch (up (N, r), down (r, K)), which reads the scaled input before its rotation.
            input_scale: (K,), positive; the input is divided by it, and the weight was multiplied.
            signs: (K,) of +1 and -1, by which the rotation multiplies the channels first; None: all are +1.
            clip: bins of the noise level, and for each bin the factor (bins,) of the range of the input's values from
                which its scales are computed. The bins must be attached to the model that contains the layer.

        Raises:
            UserError: the formats, the rotation or the shapes do not fit the layer.
        """
        spec = replace(spec, rank=0 if branch is None else branch[0].shape[-1])
        weight, bias = linear.weight.detach(), linear.bias
        new = cls(
            linear.in_features, linear.out_features, spec, bias=bias is not None, input_scale=input_scale is not None,
            signs=signs is not None, clips=0 if clip is None else clip[0].count, device="meta", dtype=weight.dtype,
        )  # fmt: skip
        if spec.weight is None:
            new.weight = _frozen(weight)
        new.store_(quantized)
        if bias is not None:
            new.bias = _frozen(bias.detach())
        if branch is not None:
            new.branch_up, new.branch_down = (
                _frozen(_fitting(each.to(weight), like, "the branch"))
                for each, like in zip(branch, (new.branch_up, new.branch_down), strict=True)
            )
        if input_scale is not None:
            new.input_scale = _float_bits(_fitting(input_scale, new.input_scale, "input_scale"), weight.device)
        if signs is not None:
            new.signs = _fitting(signs, new.signs, "signs").to(weight.device, torch.int8)
        if clip is not None:
            new.bins = clip[0]
            new.act_clip = _float_bits(_fitting(clip[1], new.act_clip, "clip"), weight.device)
        return new.to(weight.device).train(linear.training)

    @property
    def mode(self) -> Mode:
        """How the layer computes, chosen by its formats and its device, unless a program has set it.

        Raises:
            UserError: at setting, if the formats of the layer do not allow the mode.
        """
        if self._forced is not None:
            return self._forced
        if self._modes() == ("sim",):
            return "sim"
        return mode_for(self.spec, (self.out_features, self.in_features), self.weight.device)

    @mode.setter
    def mode(self, mode: Mode | None) -> None:
        allowed = self._modes()
        if mode is not None and mode not in allowed:
            raise UserError(
                f"mode is {shown(mode)}, but this layer ({self.extra_repr()}) allows {', '.join(allowed)}, or None for"
                " the fastest that the device has"
            )
        self._forced = mode

    def _modes(self) -> tuple[Mode, ...]:
        # The product with scales of blocks has no clip.
        in_blocks = self.spec.act is not None and self.spec.act.share == "block"
        return ("sim",) if in_blocks and self.act_clip is not None else modes(self.spec)

    def quantized(self) -> Quantized:
        """Return the quantised weight (N, K), of the scaled and rotated channels and without the branch.

        Raises:
            UserError: the weight of this layer is exact.
        """
        if self.spec.weight is None:
            raise UserError("this layer keeps its weight exact: only its input is quantised")
        return unpack(self.packed(), self.spec.weight, (self.out_features, self.in_features))

    def packed(self) -> dict[str, Tensor]:
        """Return the tensors of the packed weight, as `packing.pack` describes them, in views as integers."""
        found = {name: getattr(self, name) for name in PACKED}
        return {name: each.detach() for name, each in found.items() if each is not None}

    @torch.no_grad()
    def store_(self, quantized: Quantized | None) -> None:
        """Put another quantised weight into the layer.

        Args:
            quantized: the weight, as in `of`; None for a layer that keeps its weight exact.

        Raises:
            UserError: its format or its shape is not that of the layer.
        """
        said = None if quantized is None else (quantized.format, tuple(quantized.shape))
        wanted = None if self.spec.weight is None else (self.spec.weight, (self.out_features, self.in_features))
        if said != wanted:
            raise UserError(f"the layer needs {_named(wanted)}, got {_named(said)}")
        if quantized is None:
            return
        device = None if self.weight.is_meta else self.weight.device
        for name, tensor in pack(quantized).items():
            bits = tensor.view(bits_dtype(tensor.dtype)).to(device)
            setattr(self, name, _frozen(bits) if name == "weight" else bits)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (N, K) that the layer multiplies with, of the rotated channels and without the branch."""
        if self.spec.weight is not None:
            return expanded(self.packed(), self.spec.weight, self.in_features, dtype)
        weight, scale = self.weight, self._scale()
        if scale is not None:
            weight = weight.float() * scale
        return (rotated(weight, self.spec.rotate, self.signs) if self.spec.rotate else weight).to(dtype)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """Return the weight (N, K) of the linear layer that this layer approximates, float32."""
        weight = rotated_back(self.dequantized(), self.spec.rotate, self.signs)
        if self.branch_up is not None and self.branch_down is not None:
            weight = weight + self.branch_up.float() @ self.branch_down.float()
        scale = self._scale()
        return weight if scale is None else weight / scale

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer.

        Args:
            input: (..., in_features).

        Returns:
            (..., out_features), in the dtype of the input, or in the autocast dtype where autocast is on.
        """
        device = input.device.type
        # Like torch itself: autocast does not cast float64.
        if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        dtype = input.dtype
        scale = self._scale()
        x = input if scale is None else (input / scale).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            out = self._multiplied(x, bias, dtype)
            if self.branch_up is not None and self.branch_down is not None:
                low = functional.linear(x, self.branch_down.to(dtype))
                out = out + functional.linear(low, self.branch_up.to(dtype))
        return out

    def extra_repr(self) -> str:
        """Describe the layer in the text of the model."""
        spec = self.spec
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        parts += [f"{name}={format.text}" for name in ("weight", "act") if (format := getattr(spec, name))]
        parts += [f"{name}={size}" for name in ("rotate", "rank") if (size := getattr(spec, name))]
        return ", ".join(parts)

    def _scale(self) -> Tensor | None:
        return None if self.input_scale is None else self.input_scale.view(torch.float32)

    def _multiplied(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if self.spec.weight is None:
            turned = self._rotated(x)
            return functional.linear(_straight(turned, self._input(turned)).to(dtype), self.dequantized(dtype), bias)
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            found: Tensor = _StraightThrough.apply(x, bias, self, dtype)  # type: ignore[no-untyped-call]
            return found
        return self._product(x, bias, dtype)

    def _product(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Multiply the scaled input with the weight; no gradient."""
        mode, spec = self.mode, self.spec
        if mode in ("dequant", "sim"):
            return functional.linear(self._input(self._rotated(x)).to(dtype), self.dequantized(dtype), bias)
        assert spec.weight is not None
        assert spec.act is not None
        if spec.act.share == "block":
            return blocks_product(self._rotated(x), self.packed(), bias, dtype)
        kind = E4M3 if mode == "fp8" else torch.int8
        clip = self._clip(x)

        def rounded_rows() -> Rows:
            return input_rows(x.detach(), spec, self.signs, clip, kind)

        shares = self.shares_input and self.signs is None and clip is None
        rows = shared_rows(x, (kind, spec.rotate), rounded_rows) if shares else rounded_rows()
        return rows_product(rows, eight_bits(self.packed(), spec.weight, self.in_features, kind), bias, dtype)

    def _rotated(self, x: Tensor) -> Tensor:
        # Rounding begins with the rotated channels in float32.
        return rotated(x, self.spec.rotate, self.signs) if self.spec.rotate else x

    def _input(self, x: Tensor) -> Tensor:
        return x if self.spec.act is None else rounded(x.detach(), self.spec.act, self._clip(x))

    def _clip(self, x: Tensor) -> Tensor | None:
        """Return the factors of the range of x in the running forward pass, (B, 1, ..., 1)."""
        if self.act_clip is None:
            return None
        if self.bins is None:
            raise UserError("the layer clips its input by bins of the noise level: set its `bins`, which are missing")
        return self.bins.pick(self.act_clip.view(torch.float32), x)


class _StraightThrough(torch.autograd.Function):
    """The product of a layer, whose gradient expands the weight again instead of keeping it for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.x_dtype = layer, x.dtype
        return layer._product(x, bias, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            layer: QLinear = ctx.layer
            of_turned = gradient @ layer.dequantized(gradient.dtype)
            of_x = rotated_back(of_turned, layer.spec.rotate, layer.signs).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_x, of_bias, None, None


def check_spec(spec: LayerSpec, channels: int) -> None:
    """Check that a layer with this number of input channels can be quantised.

    Raises:
        UserError: the group of a format or the rotation does not divide the channels, or nothing is quantised.
    """
    if spec.exact:
        raise UserError("weight and act are both None, so nothing of the layer is quantised: leave it as it is")
    for format in (spec.weight, spec.act):
        if format is not None:
            format.group(channels)
    check_rotation(spec.rotate, channels)


def _take_zero(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Give a layer a buffer for the zero points of a state dict, which are float32 where they are not bytes."""
    stored, own = state.get(f"{prefix}weight_zero"), layer.weight_zero
    if stored is not None and isinstance(own, Tensor) and own.dtype != stored.dtype:
        layer.weight_zero = torch.empty_like(own, dtype=stored.dtype)


def _straight(x: Tensor, value: Tensor) -> Tensor:
    """Return `value` with the gradient of x. The difference is an exact 0, so no bit of `value` changes."""
    return value if value is x else value + (x - x.detach())


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _float_bits(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, torch.float32).contiguous().view(torch.int32)


def _fitting(tensor: Tensor, like: Tensor | None, name: str) -> Tensor:
    if like is None or tensor.shape != like.shape:
        wanted = None if like is None else tuple(like.shape)
        raise UserError(f"{name} has the shape {tuple(tensor.shape)}, the layer needs {wanted}")
    return tensor.detach()


def _named(said: tuple[Format, tuple[int, ...]] | None) -> str:
    return "an exact weight" if said is None else f"a {said[0].text} weight {said[1]}"
