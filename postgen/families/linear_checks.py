"""Checks of the linear layers to replace: a layer whose replacement would silently give wrong results is refused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from postgen.compat import lora_base_problem, module_hooks
from postgen.errors import UserError


def check_wrappers(model: nn.Module) -> None:
    """Refuse a model that is wrapped for several processes (DDP, FSDP).

    Raises:
        UserError: the model is wrapped; the message names the wrapper.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel | FSDPModule | DistributedDataParallel):
            where = name or "the model"
            raise UserError(f"{where} is wrapped by {type(module).__name__}: replace linear layers before wrapping")


def check_layers(model: nn.Module, layers: dict[str, nn.Linear]) -> None:
    """Refuse layers whose weights are also used elsewhere, and layers that do not compute exactly as `nn.Linear` does.

    Args:
        model: the model with the layers.
        layers: layer name -> layer.

    Raises:
        UserError: a layer cannot be replaced; the message names the layer and the reason.
    """
    users: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)].append(name)
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    for name, linear in layers.items():
        for problem in (*_problems(linear, users, names), *_problems_around(model, names[id(linear)][0])):
            raise UserError(f"{name} cannot be replaced: {problem}")


def check_not_quantized(model: nn.Module, cannot: str) -> None:
    """Refuse a model with linear layers whose weights are codes.

    Args:
        model: the model.
        cannot: what cannot be done with it, for the message, such as "be converted".

    Raises:
        UserError: the model has such a layer; the message names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            raise UserError(
                f"this {type(model).__name__} is quantised ({name} is a {type(module).__name__}), so it cannot"
                f" {cannot}"
            )


def check_no_adapters(model: nn.Module, how: str) -> None:
    """Refuse a model with adapters of peft in its layers.

    Args:
        model: the model.
        how: what to do instead, for the message, a sentence without its dot.

    Raises:
        UserError: the model has such layers; the message names their adapters.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if layers:
        names = dict.fromkeys(name for layer in layers for name in getattr(layer, "lora_A", ()))
        what = f"has the LoRA {', '.join(names)}" if names else "has layers for adapters"
        raise UserError(f"this {type(model).__name__} already {what}. {how}")


def lora_problem(wrapper: nn.Module) -> str | None:
    """Return why the adapters of a peft wrapper cannot be merged into another weight; None if they can.

    Also None for a module that is no wrapper.
    """
    return lora_base_problem(wrapper)


def _problems(linear: nn.Linear, users: dict[int, list[str]], names: dict[int, list[str]]) -> Iterator[str]:
    if type(linear) is not nn.Linear:
        yield f"it is a {type(linear).__name__}, not an nn.Linear: it may compute differently, or others may read it"
    elif type(linear.weight) is not nn.Parameter or type(linear.weight.data) is not Tensor:
        yield f"its weight is a {type(linear.weight.data).__name__}: it is already sharded or quantised"
    elif linear.weight.is_meta or linear.weight.shape != (linear.out_features, linear.in_features):
        yield "its weight is not in memory: load the model and switch offloading off first"
    for parameter in linear.parameters():
        if len(shared := users[id(parameter)]) > 1:
            yield f"its weights are tied: {' and '.join(shared)}"
    if len(same := names[id(linear)]) > 1:
        yield f"it is the same layer as {same[1]}"
    hooks = [*linear._forward_hooks, *linear._forward_pre_hooks, *linear._backward_hooks]
    if hooks:
        yield f"{len(hooks)} hooks on it would not run after the replacement: remove them first"


def _problems_around(model: nn.Module, name: str) -> Iterator[str]:
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts) + 1)]
    for module in around:
        if hooks := module_hooks(module, itself=module is around[-1]):
            yield f"{hooks} would lose the layer: replace linear layers before switching that on"
    if problem := lora_base_problem(around[-2]):
        yield problem
    if any(getattr(module, "fused_projections", False) for module in around[:-1]):
        yield "the projections are fused, so some are not called: call unfuse_qkv_projections() first"
