"""What postgen has put on a model, kept on the model itself: a deep copy carries its own, and nothing is saved."""

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
    """What a method leaves on a transformer."""

    def describe(self) -> str:
        """Say in one line what is on and how it is set."""


@dataclass(slots=True)
class Installed:
    """Everything of ours on one transformer."""

    stack: ProcessorStack | None = None
    """Who computes its attention, and what is wrapped around it."""
    plug_ins: dict[str, Any] = field(default_factory=dict)
    """`PlugIn` objects by the name of their method, in the order they were applied."""


def installed(transformer: nn.Module) -> Installed:
    """Return the record of a transformer (DDP, peft, compile wrappers are looked through), an empty one at first."""
    model = unwrap(transformer)
    found: Installed | None = model.__dict__.get(_ATTRIBUTE)
    if found is None:
        found = Installed()
        model.__dict__[_ATTRIBUTE] = found
    return found


def moved_by(module: nn.Module) -> str | None:
    """Name the hook of accelerate that brings a module to another device for each call (offloading); None: none."""
    hook = module_hooks(module, itself=True)
    return hook if hook is not None and hook.startswith("accelerate") else None


def computes_on(model: nn.Module, inputs: Iterable[Any] = ()) -> torch.device:
    """Return the device that a model computes on, which offloading keeps its weights away from between calls.

    Args:
        model: with parameters.
        inputs: arguments of the call under way, if there is one: of offloaded groups of layers nothing else tells it.
    """
    import torch

    place = hooked_device(model)
    if place is not None:
        return place
    places = (next(model.parameters()).device, *(each.device for each in inputs if isinstance(each, torch.Tensor)))
    return next((place for place in places if place.type not in ("cpu", "meta")), torch.device("cpu"))


def processor_stack(transformer: nn.Module) -> ProcessorStack:
    """Return the stack of a transformer (DDP, peft, compile wrappers are looked through), an empty one at first."""
    found = installed(transformer)
    if found.stack is None:
        found.stack = ProcessorStack(unwrap(transformer))
    return found.stack


def living(hooks: Iterable[RemovableHandle]) -> list[RemovableHandle]:
    """Return the handles of hooks on modules that are still there: torch can neither copy nor pickle the others.

    A block that is copied without its transformer takes along what is on it, and that has handles of the transformer.
    """
    return [hook for hook in hooks if hook.hooks_dict_ref() is not None]


def transformers_of(target: Any) -> dict[str, nn.Module]:
    """Return the transformers of a pipeline by component name, or a bare transformer under the name "".

    One that stands in a pipeline twice comes once, under its first name.

    Raises:
        UserError: neither a pipeline with a transformer nor a module.
    """
    from torch import nn

    if isinstance(target, nn.Module):
        return {"": unwrap(target)}
    found: dict[str, nn.Module] = {}
    components = getattr(target, "components", {})
    if isinstance(target, type) or not isinstance(components, Mapping):
        raise UserError("a class was given: give a diffusers video pipeline that is loaded, or its transformer")
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
