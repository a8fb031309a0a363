"""Merging of LoRA adapters into quantised layers.

pipe.load_lora_weights("style.safetensors")
merge_lora_(pipe.transformer)                      # rounds the changed weights again
merge_lora_(pipe.transformer, requantize=False)    # keeps the adapter exact, as a low-rank branch of each layer
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families.installed import inner_model
from postgen.families.linear_checks import lora_problem
from postgen.quant.layers import quantized_layers
from postgen.quant.linear import QLinear
from postgen.quant.model import Solve, bare_linear, rtn
from postgen.quant.rotation import rotated
from postgen.quant.rounding import Quantized, qsnr, quantize_tensor


@torch.no_grad()
def merge_lora_(model: nn.Module, *, requantize: bool = True, solve: Solve = rtn) -> dict[str, float]:
    """Merge the active LoRA adapters of a quantised model into its weights, and remove all adapters.

    Args:
        model: a diffusers model with quantised layers and adapters; it may be wrapped (compiled).
        requantize: True rounds each changed weight again: to the codes of `solve`, or to the nearest codes under the
            present scales, whichever loses less. False adds the adapter to the low-rank branch of the layer, which is
            exact, costs memory and time, and keeps the codes.
        solve: finds codes and scales, as in `quantize_weights`; only with `requantize`.

    Returns:
        Quantised layer with an adapter -> signal-to-noise ratio in dB of its weight against the exact sum.

    Raises:
        UserError: the model has no adapters or no quantised layers, or an adapter cannot be merged; nothing changes.
    """
    inner: Any = inner_model(model)
    if not quantized_layers(inner):
        raise UserError(f"this {type(inner).__name__} has no quantised layers: merge its adapters with fuse_lora()")
    wrappers = _wrappers(inner)
    _check(inner, wrappers)
    found: dict[str, float] = {}
    for name, wrapper in wrappers.items():
        layer, adapters = wrapper.base_layer, _active(wrapper)
        for bias in _biases(wrapper):
            layer.bias.add_(bias.to(layer.bias))
        for each in adapters:  # peft would refuse a bias of 0 on a layer without a bias
            wrapper.lora_bias[each] = False
        if not isinstance(layer, QLinear):
            wrapper.merge(adapter_names=adapters)
        elif adapters:
            wanted = layer.effective_weight() + sum(wrapper.get_delta_weight(each).float() for each in adapters)
            if layer.spec.weight is None:
                layer.weight = nn.Parameter(wanted.to(layer.weight.dtype), requires_grad=False)
            elif requantize:
                layer.store_(_requantized(name, layer, wanted, solve))
            else:
                for each in adapters:
                    up = wrapper.lora_B[each].weight * wrapper.scaling[each]
                    _widen_branch_(layer, up, wrapper.lora_A[each].weight)
            found[name] = qsnr(wanted, layer.effective_weight())
    inner.unload_lora()
    if not requantize:
        from postgen.quant.hf import mark_quantized

        mark_quantized(inner)
    return found


def _wrappers(model: nn.Module) -> dict[str, Any]:
    """Return peft's wrappers of layers, by the name of the layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _check(model: nn.Module, wrappers: dict[str, Any]) -> None:
    if not wrappers or not hasattr(model, "unload_lora"):
        raise UserError(f"this {type(model).__name__} has no LoRA adapters: load one first")
    for name, wrapper in wrappers.items():
        problem = lora_problem(wrapper)
        if problem is None and wrapper.base_layer.bias is None and _biases(wrapper):
            problem = "it has a bias, and the layer has none"
        if problem is not None:
            raise UserError(f"the adapter of {name} cannot be merged: {problem}")


def _active(wrapper: Any) -> list[str]:
    return [] if wrapper.disable_adapters else [each for each in wrapper.active_adapters if each in wrapper.lora_A]


def _biases(wrapper: Any) -> list[Tensor]:
    """Return what active adapters with a bias that is not 0 add to the bias of the layer."""
    having = [each for each in _active(wrapper) if wrapper.lora_bias.get(each)]
    found = [wrapper.lora_B[each].bias.detach().float() * wrapper.scaling[each] for each in having]
    return [each for each in found if bool(each.any())]


def _requantized(name: str, layer: QLinear, wanted: Tensor, solve: Solve) -> Quantized:
    """Return the codes that lose less: those of the solver, or the nearest ones under the present scales."""
    left, present = _left_of(wanted, layer), layer.quantized()
    both = solve(name, bare_linear(left), layer.spec), quantize_tensor(left, present.format, present.scales)
    return max(both, key=lambda each: qsnr(left, each.numbers()))


def _left_of(weight: Tensor, layer: QLinear) -> Tensor:
    """Return what a layer has to quantise of a weight (N, K): scaled, without the branch, and rotated; float32."""
    scale = None if layer.input_scale is None else layer.input_scale.view(torch.float32)
    left = weight.float() if scale is None else weight.float() * scale
    if layer.branch_up is not None and layer.branch_down is not None:
        left = left - layer.branch_up.float() @ layer.branch_down.float()
    return rotated(left, layer.spec.rotate, layer.signs)


def _widen_branch_(layer: QLinear, up: Tensor, down: Tensor) -> None:
    """Add a low-rank change (N, r) (r, K) of the weight to the branch of a layer, which reads the scaled input."""
    scale = None if layer.input_scale is None else layer.input_scale.view(torch.float32)
    down = down.float() if scale is None else down.float() * scale
    dtype = next((each.dtype for each in (layer.branch_up, layer.bias) if each is not None), up.dtype)
    parts = (layer.branch_up, up, 1), (layer.branch_down, down, 0)
    layer.branch_up, layer.branch_down = (
        nn.Parameter(new if old is None else torch.cat([old, new], axis), requires_grad=False)
        for old, new, axis in ((old, new.to(layer.weight.device, dtype), axis) for old, new, axis in parts)
    )
    layer.spec = replace(layer.spec, rank=len(layer.branch_down))
