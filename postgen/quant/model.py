"""Quantise the linear layers of a transformer.

report = quantize_weights(pipe.transformer, QuantSpec(weight="int4:g64", act="fp8:token"))
pipe.transformer.save_pretrained("out")   # later: import postgen; WanTransformer3DModel.from_pretrained("out")
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families.installed import inner_model
from postgen.families.linear import replace_linears
from postgen.quant.layers import layers_of, modulation_of, quantized_layers
from postgen.quant.linear import QLinear
from postgen.quant.report import LayerReport, QuantReport, tensor_bytes
from postgen.quant.rotation import rotated
from postgen.quant.rounding import Quantized, quantize_tensor
from postgen.quant.spec import LayerSpec, QuantSpec
from postgen.quant.transforms.low_rank import low_rank_branch, residual_of
from postgen.training.logging import Progress

OWNER = "quant"
"""The name of this owner in the registry of replaced linear layers."""

Solve = Callable[[str, nn.Linear, LayerSpec], Quantized]
"""(name, layer, how it is quantised) -> the quantised weight. The weight of the layer is what remains to be quantised:
float32, rotated, and without the low-rank branch."""
Make = Callable[[str, nn.Linear, LayerSpec], QLinear]
"""(name, layer, how it is quantised) -> the quantised layer."""


def rtn(name: str, linear: nn.Linear, spec: LayerSpec) -> Quantized:
    """Round the weight of a layer to nearest; the range of each group contains all its weights."""
    assert spec.weight is not None
    return quantize_tensor(linear.weight.detach(), spec.weight)


def quantize_weights(model: nn.Module, spec: QuantSpec, solve: Solve = rtn, *, progress: bool = False) -> QuantReport:
    """Replace the linear layers of a transformer by quantised layers, in place and without data.

    `save_pretrained` of the model then writes packed weights, and `from_pretrained` reads them after `import postgen`.

    Args:
        model: a transformer, which may be wrapped (peft, compiled).
        spec: what to quantise, see `layers.layers_of`.
        solve: finds codes and scales of each layer.
        progress: whether to show a progress bar.

    Returns:
        What was quantised, with the noise of each weight and the bytes before and after.

    Raises:
        UserError: the spec does not fit the model, or the model is quantised already; nothing changes. If `solve`
            raises, some layers are quantised and their weights are lost: load the model again.
    """

    def make(name: str, linear: nn.Linear, each: LayerSpec) -> QLinear:
        return quantized_layer(name, linear, each, solve)

    return replace_with(model, spec, make, progress=progress)


def quantized_layer(name: str, linear: nn.Linear, spec: LayerSpec, solve: Solve = rtn) -> QLinear:
    """Make the quantised layer of a linear layer: subtract the low-rank branch, rotate, and find codes and scales.

    Args:
        name: name of the layer, for `solve`.
        linear: the layer.
        spec: how it is quantised.
        solve: finds codes and scales.

    Raises:
        UserError: the spec does not fit the layer.
    """
    if spec.weight is None:
        return QLinear.of(linear, None, spec)
    weight = linear.weight.detach()
    branch = low_rank_branch(weight, spec.rank, dtype=weight.dtype) if spec.rank else None
    left = rotated(weight if branch is None else residual_of(weight, branch), spec.rotate)
    return QLinear.of(linear, solve(name, bare_linear(left), spec), spec, branch=branch)


def bare_linear(weight: Tensor) -> nn.Linear:
    """Return a linear layer of a weight (N, K), without a bias, as a `Solve` gets it."""
    with torch.device("meta"):
        found = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    found.weight = nn.Parameter(weight, requires_grad=False)
    return found


def check_exact(model: nn.Module) -> None:
    """Check that a model is neither quantised nor saved in the format of another method.

    Raises:
        UserError: it is.
    """
    if quantized_layers(model):
        raise UserError(f"this {type(model).__name__} is quantised already: load the exact model")
    if _is_diffusers(model):
        from postgen.quant.hf import config_of

        config_of(model)


def _is_diffusers(model: nn.Module) -> bool:
    return hasattr(inner_model(model), "register_to_config")


def replace_with(model: nn.Module, spec: QuantSpec, make: Make, *, progress: bool = False) -> QuantReport:
    """Replace the linear layers of a transformer by layers that `make` returns, as `quantize_weights` does.

    Args:
        model: a transformer, which may be wrapped (peft, compiled).
        spec: what to quantise.
        make: returns the quantised layer of a linear layer, on the same device. Layers of modulation are rounded to
            nearest in its place.
        progress: whether to show a progress bar.

    Raises:
        UserError: as in `quantize_weights`.
    """
    check_exact(model)
    layers, modulation, before = layers_of(model, spec), modulation_of(model, spec), tensor_bytes(model)
    reports: dict[str, LayerReport] = {}

    def replacement(name: str, linear: nn.Linear) -> nn.Module:
        if name in modulation:  # only now, because folds of a recipe have changed these weights
            new = quantized_layer(name, linear, modulation[name])
        else:
            new = make(name, linear, layers[name])
        reports[name] = LayerReport.of(linear, new)
        bar.step()
        return new

    pattern = "|".join(map(re.escape, (*layers, *modulation)))
    bar = Progress(step=0, max_steps=len(layers) + len(modulation), shown=progress, name="quantise layers")
    try:
        replace_linears(model, replacement, owner=OWNER, pattern=pattern, originals="dropped")
    finally:
        bar.close()
    if _is_diffusers(model):
        from postgen.quant.hf import mark_quantized

        mark_quantized(model, spec)
    return QuantReport(layers=reports, bytes_before=before, bytes_after=tensor_bytes(model))
