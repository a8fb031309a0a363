"""What observers of calibration receive: inputs and outputs of modules, with the bin of the running forward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from postgen.families.recording import eagerly

Branch = Literal["prompt", "negative"]
"""Text of a forward pass; "negative" occurs only with classifier-free guidance."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Bin:
    """A group of points with similar activations."""

    level: int
    """Bin of the noise level in the `StepBins` of the expert, from the noisiest."""
    branch: Branch = "prompt"
    expert: str = "transformer"
    """Name of the transformer in its pipeline; Wan 2.2 has two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """A forward pass over points of one bin."""

    bin: Bin
    prompts: tuple[int, ...]
    """Number of the prompt of each row."""
    weight: float
    """Weight of each row: those of all rows of a bin sum to 1, so that every bin counts equally."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tap:
    """A place in a model from which an observer receives a tensor."""

    name: str
    """Name under which the observer keeps it."""
    module: nn.Module
    read: Callable[[tuple[Any, ...], Mapping[str, Any], Any], Tensor]
    """(positional arguments, keyword arguments, output) of a call of the module -> the tensor. The output is None
    before the call."""
    after: bool = False
    """Whether the tensor is read after the call, because it is an output."""


class EndPass(Exception):
    """Raised by an observer that needs no more of a forward pass; `Calibration.stream` goes on with the next one."""


class Observer(ABC):
    """Collects statistics while a model runs over calibration points."""

    @abstractmethod
    def taps(self, linears: Mapping[str, nn.Module], model: nn.Module) -> Sequence[Tap]:
        """Return the places that this observer watches.

        Args:
            linears: the linear layers of interest, by name.
            model: the transformer, or the part of it that runs.
        """

    @abstractmethod
    def see(self, name: str, x: Tensor, visit: Visit) -> None:
        """Take one tensor. Gradients are off.

        Args:
            name: name of the tap.
            x: the tensor (B, ..., C), or with a first axis that joins the batch with tokens. It must not be changed.
            visit: the points of the running forward pass.
        """


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
    """Return the first argument of a call: the input of a linear layer or a norm."""
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def input_taps(modules: Mapping[str, nn.Module]) -> list[Tap]:
    """Return taps on the inputs of modules, under the names of the modules."""
    return [Tap(name=name, module=module, read=first_argument) for name, module in modules.items()]


@contextmanager
def tapped(taps: Sequence[Tap], take: Callable[[Tap, Tensor], None]) -> Iterator[None]:
    """Call a function with the tensors at taps while modules run in this block."""

    def before(tap: Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(tap, tap.read(args, kwargs, None))

    def after(tap: Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        take(tap, tap.read(args, kwargs, output))

    with ExitStack() as stack:
        stack.enter_context(eagerly())
        for tap in taps:
            if tap.after:
                hook = tap.module.register_forward_hook(partial(after, tap), with_kwargs=True)
            else:
                hook = tap.module.register_forward_pre_hook(partial(before, tap), with_kwargs=True)
            stack.callback(hook.remove)
        yield


@contextmanager
def watching(
    linears: Mapping[str, nn.Module], model: nn.Module, observers: Sequence[Observer], visit: Callable[[], Visit]
) -> Iterator[None]:
    """Let observers see the tensors of a model while it runs in this block.

    Args:
        linears: the linear layers of interest, by name.
        model: the transformer, or the part of it that runs.
        observers: the observers.
        visit: returns the points of the running forward pass.
    """

    def take(observer: Observer, tap: Tap, x: Tensor) -> None:
        with torch.no_grad():
            observer.see(tap.name, x, visit())

    with ExitStack() as stack:
        for observer in observers:
            stack.enter_context(tapped(observer.taps(linears, model), partial(take, observer)))
        yield
