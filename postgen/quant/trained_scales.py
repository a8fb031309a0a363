"""Quantised linear layers whose scales are trained while their codes and zero points stay (E2E-QP, arXiv:2407.11062).

    ~W = (q - z) s              s is a parameter; q and z are frozen, and stay packed in memory
    ~W = c_0 + sum_i c_i B_i    the coefficients c of bit planes are parameters; the planes are frozen

The forward pass expands the weight, and the backward pass expands it again, so between the two passes a layer keeps
its packed weight and its input only.

A layer may have an auxiliary low-rank branch (QVGen, arXiv:2505.11497): y += up (g * (down x)) with gains g of its
components. It takes over what rounding has lost, and its components are switched off one group after another
(`postgen.quant.branch_decay`), so that the trained layer does not need it any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from postgen.errors import UserError
from postgen.kernels.fp8 import E4M3, E4M3_MAX, SMALLEST_SCALE
from postgen.quant.formats import Format
from postgen.quant.gradients import through
from postgen.quant.linear import PACKED, QLinear
from postgen.quant.packing import bits_dtype, pack, unpack
from postgen.quant.rounding import Quantized
from postgen.training.twins import set_in

SCALE, UP, DOWN, GAIN = "trained_scale", "aux_up", "aux_down", "aux_gain"
"""Names of the trained tensors of a layer: its scales, the two matrices of its auxiliary branch, and their gains."""


def check_trainable(format: Format | None, name: str) -> None:
    """Check that the scales of a format can be trained.

    Args:
        format: the format of the weight; None for an exact weight.
        name: name of the layer, for the message.

    Raises:
        UserError: the scales are powers of two.
    """
    if format is not None and format.scale == "e8m0":
        raise UserError(
            f"{name} has a weight in {format.text}, whose scales are powers of two and cannot be trained: use an"
            " integer format such as int4:g32, fp8, nvfp4 or bit planes"
        )


def stored(scale: Tensor, format: Format) -> Tensor:
    """Return scales as the checkpoint stores them, with the gradient of the unrounded scales.

    Float32 scales stay, but are positive; E4M3 scales and the bfloat16 coefficients of bit planes are rounded.
    """
    if format.planes:
        return through(scale, scale.bfloat16().float())
    if format.scale == "e4m3":
        return through(scale, scale.clamp(0, E4M3_MAX).to(E4M3).float())
    return through(scale, scale.clamp_min(SMALLEST_SCALE))


class ScaleLinear(QLinear):
    """A quantised linear layer with trained scales, in place of a `QLinear` while a model trains.

    The layer shares the tensors of the `QLinear` and computes as its modes "dequant" and "sim" do.

    Args:
        layer: the quantised layer.
        name: its name in the model, for messages.

    Raises:
        UserError: the scales of the format cannot be trained.
    """

    trained_scale: nn.Parameter | None
    aux_up: nn.Parameter | None
    aux_down: nn.Parameter | None
    aux_gain: Tensor | None

    def __init__(self, layer: QLinear, name: str = "the layer") -> None:
        check_trainable(layer.spec.weight, name)
        dtype = None if layer.bias is None else layer.bias.dtype
        super().__init__(
            layer.in_features, layer.out_features, layer.spec, device="meta", dtype=dtype, **parts_of(layer)
        )
        self.bins = layer.bins
        for key, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            setattr(self, key, tensor)
        scale = None if self.spec.weight is None else layer.quantized().scales.scale
        self.trained_scale = None if scale is None else nn.Parameter(scale.clone())
        self.register_parameter(UP, None)
        self.register_parameter(DOWN, None)
        self.register_buffer(GAIN, None)

    def add_branch_(self, up: Tensor, down: Tensor) -> None:
        """Add an auxiliary branch, which reads the scaled input before its rotation; all its gains are 1.

        Args:
            up: (N, r).
            down: (r, K).
        """
        self.aux_up, self.aux_down = nn.Parameter(up.float()), nn.Parameter(down.float())
        self.aux_gain = torch.ones(up.shape[-1], device=up.device)

    def quantized(self) -> Quantized:
        """Return the quantised weight with the present scales, without a gradient; see `QLinear.quantized`."""
        found = super().quantized()
        return found if self.trained_scale is None else _with_scale(found, self.trained_scale.detach())

    def weight_with(self, scale: Tensor) -> Tensor:
        """Return the weight (N, K), float32, with other scales, and with their gradients."""
        return _with_scale(super().quantized(), scale).numbers()

    def _multiplied(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if self.trained_scale is None:
            return super()._multiplied(x, bias, dtype)
        x = self._rotated(x)
        if self.spec.act is not None:
            x = through(x, self._input(x))
        found: Tensor = _Product.apply(x.to(dtype), self.trained_scale, bias, self)  # type: ignore[no-untyped-call]
        return found

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer; see `QLinear.forward`."""
        out = super().forward(input)
        if self.aux_up is None or self.aux_down is None or self.aux_gain is None:
            return out
        scale = self._scale()
        x = input if scale is None else input / scale
        x = x.to(out.dtype)
        with torch.autocast(x.device.type, enabled=False):
            low = functional.linear(x, self.aux_down.to(x.dtype)) * self.aux_gain.to(x.dtype)
            return out + functional.linear(low, self.aux_up.to(x.dtype))


def parts_of(layer: QLinear) -> dict[str, Any]:
    """Return the arguments of `QLinear` that say which tensors a layer has."""
    return {
        "bias": layer.bias is not None,
        "input_scale": layer.input_scale is not None,
        "signs": layer.signs is not None,
        "clips": 0 if layer.act_clip is None else len(layer.act_clip),
    }


class _Product(torch.autograd.Function):
    """x W^T with a weight that is expanded in both passes instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bias: Tensor | None, layer: ScaleLinear) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.layer = layer
        return functional.linear(x, layer.weight_with(scale).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        of_x = of_scale = of_bias = None
        with torch.enable_grad():
            own = scale.detach().requires_grad_(ctx.needs_input_grad[1])
            weight = ctx.layer.weight_with(own)
        if ctx.needs_input_grad[0]:
            of_x = grad @ weight.detach().to(grad.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
            (of_scale,) = torch.autograd.grad(weight, own, of_weight.float())
        if ctx.needs_input_grad[2]:
            of_bias = grad.flatten(0, -2).sum(0)
        return of_x, of_scale, of_bias, None


def scale_layers(model: nn.Module) -> dict[str, ScaleLinear]:
    """Return the layers of a model whose scales are trained, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ScaleLinear)}


def train_scales_(model: nn.Module) -> dict[str, ScaleLinear]:
    """Replace the quantised layers of a model by layers with trained scales, in place; return them by name.

    Raises:
        UserError: the model has no quantised layer with a quantised weight, or scales that cannot be trained.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, QLinear)}
    for name, layer in found.items():
        check_trainable(layer.spec.weight, name)
    if not any(layer.spec.weight is not None for layer in found.values()):
        raise UserError(
            "no layer has a quantised weight, so there are no scales to train: give a format for the weights"
        )
    for name, layer in found.items():
        set_in(model, name, ScaleLinear(layer, name))
    return scale_layers(model)


def trained_weight(layer: ScaleLinear, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the packed weight of a layer with its trained scales, as a `QLinear` stores it.

    Args:
        layer: the layer; only its spec and its shape are used.
        tensors: its whole tensors by name, packed and trained.
    """
    format = layer.spec.weight
    if format is None:
        return {}
    packed = {name: tensors[name] for name in PACKED if name in tensors}
    before = unpack(packed, format, (layer.out_features, layer.in_features))
    after = _with_scale(before, tensors[SCALE])
    return {name: tensor.view(bits_dtype(tensor.dtype)) for name, tensor in pack(after).items()}


def _with_scale(quantized: Quantized, scale: Tensor) -> Quantized:
    return replace(quantized, scales=replace(quantized.scales, scale=stored(scale, quantized.format)))
