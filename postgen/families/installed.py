"""The record of what postgen has installed on a model.

The record is an attribute of the model itself: a deep copy of the model carries its own record, and `save_pretrained`
does not save it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from postgen.compat import hooked_device, module_hooks, unwrap
from postgen.errors import UserError
from postgen.families.processors import ProcessorStack

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

_ATTRIBUTE = "_postgen_installed"


class PlugIn(Protocol):
    """What every method's object on a transformer must provide."""

    def describe(self) -> str:
        """Return one line for `postgen.summary`: whether the plug-in is on, and its settings."""


@dataclass(slots=True)
class Installed:
    """Everything that postgen has installed on one transformer."""

    stack: ProcessorStack | None = None
    """The methods that compute or wrap its attention; None before the first one."""
    plug_ins: dict[str, Any] = field(default_factory=dict)
    """`PlugIn` objects by the name of their method, in the order in which they were applied."""


def installed(transformer: nn.Module) -> Installed:
    """Return the record of a transformer; the first call makes an empty record.

    The record of a model that is wrapped by DDP, peft or `torch.compile` is that of the model inside.
    """
    model = unwrap(transformer)
    found: Installed | None = model.__dict__.get(_ATTRIBUTE)
    if found is None:
        found = Installed()
        model.__dict__[_ATTRIBUTE] = found
    return found


def inner_model(model: nn.Module) -> nn.Module:
    """Return the diffusers model inside any wrappers of DDP, FSDP, DeepSpeed, `torch.compile` and peft."""
    return unwrap(model)


def moved_by(module: nn.Module) -> str | None:
    """Return the name of the accelerate hook that moves a module to another device for each call (offloading).

    Returns:
        None where the module has no such hook.
    """
    hook = module_hooks(module, itself=True)
    return hook if hook is not None and hook.startswith("accelerate") else None


def computes_on(model: nn.Module, inputs: Iterable[Any] = ()) -> torch.device:
    """Return the device that a model computes on; the weights of an offloaded model are elsewhere between calls.

    Args:
        model: the model; it has parameters.
        inputs: arguments of the present call, if there is one. Under group offloading, only the devices of these
            arguments show where the model computes.
    """
    import torch

    place = hooked_device(model)
    if place is not None:
        return place
    places = (next(model.parameters()).device, *(each.device for each in inputs if isinstance(each, torch.Tensor)))
    return next((place for place in places if place.type not in ("cpu", "meta")), torch.device("cpu"))


def processor_stack(transformer: nn.Module) -> ProcessorStack:
    """Return the processor stack of a transformer; the first call makes an empty stack.

    The stack of a model that is wrapped by DDP, peft or `torch.compile` is that of the model inside.
    """
    found = installed(transformer)
    if found.stack is None:
        found.stack = ProcessorStack(unwrap(transformer))
    return found.stack


def living(hooks: Iterable[RemovableHandle]) -> list[RemovableHandle]:
    """Return the handles of hooks whose modules still exist: torch can neither copy nor pickle the other handles.

    Dead handles appear when a block is copied without its transformer: the plug-in objects on the block are copied
    with it, and they hold handles of hooks on the transformer.
    """
    return [hook for hook in hooks if hook.hooks_dict_ref() is not None]


def transformers_of(target: Any) -> dict[str, nn.Module]:
    """Return the unwrapped transformers of a pipeline by component name, or a bare transformer under the name "".

    Transformers are the modules whose component names begin with "transformer". A transformer that is two
    components of the pipeline is returned once, under its first name.

    Raises:
        UserError: `target` is neither a pipeline with a transformer nor a module.
    """
    from torch import nn

    if isinstance(target, nn.Module):
        return {"": unwrap(target)}
    found: dict[str, nn.Module] = {}
    components = getattr(target, "components", {})
    if isinstance(target, type) or not isinstance(components, Mapping):
        raise UserError("got a class: give a loaded diffusers video pipeline, or its transformer")
    for name, module in components.items():
        if name.startswith("transformer") and isinstance(module, nn.Module):
            inner = unwrap(module)
            if all(inner is not each for each in found.values()):
                found[name] = inner
    if not found:
        raise UserError(
            f"{type(target).__name__} has no transformer: give a diffusers video pipeline or its transformer"
        )
    return found
