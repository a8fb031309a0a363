"""Memory of the activations of a training step, counted without computing.

The network is called once with fake tensors (shapes only), and its backward pass runs. Every tensor is counted while
it lives, so the result includes temporaries, what autograd keeps, and what gradient checkpointing computes again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from postgen.errors import UserError, first_line


def training_memory(
    network: nn.Module,
    arguments: Mapping[str, Any],
    *,
    passes: int = 1,
    autocast: torch.dtype | None = None,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> int:
    """Return the largest number of bytes of tensors during a forward and backward pass, without weights and gradients.

    The memory of workspaces inside kernels is not counted. The network keeps its mode, adapters and checkpointing.

    Args:
        network: a network with trained parameters. On the meta device it has no memory, and counts as on the CPU, as
            does a network on a GPU whose functions cannot be counted.
        arguments: keyword arguments of its `forward`, on any device.
        passes: number of forward passes before the backward pass, 2 for guidance.
        autocast: dtype of autocast; None for none.
        around: context of the passes.

    Raises:
        UserError: the network computes shapes from values, so they cannot be known, or it does not take the arguments.
    """
    own = next(network.parameters()).device
    # Fake tensors of a GPU need no GPU, but some of its functions read values, such as the random state.
    places = [torch.device("cpu")] if own.type in ("meta", "cpu") else [own, torch.device("cpu")]
    for place in places:
        try:
            return _counted(network, arguments, passes, autocast, around, place)
        except UserError:
            raise
        except Exception as error:  # fake tensors raise many types of errors
            problem = first_line(error)
    raise UserError(
        f"the activations of a {type(network).__name__} cannot be counted without computing them: {problem}"
    )


def _counted(
    network: nn.Module,
    arguments: Mapping[str, Any],
    passes: int,
    autocast: torch.dtype | None,
    around: Callable[[], AbstractContextManager[Any]],
    place: torch.device,
) -> int:
    """Return the result of `training_memory` with fake tensors of the device `place`."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    live = _Live()
    with _fake_weights(network, fake, live, place), around(), fake:
        given = tree_map_only(Tensor, lambda each: torch.empty_like(each, device=place), dict(arguments))
        for tensor in tree_leaves(given):
            if isinstance(tensor, Tensor):
                live.ignore(tensor)
        with live:
            _step(network, given, passes, autocast, place)
    return live.peak


def _step(
    network: nn.Module, arguments: dict[str, Any], passes: int, autocast: torch.dtype | None, device: torch.device
) -> None:
    loss: Tensor | None = None
    for _ in range(passes):
        mode = nullcontext() if autocast is None else torch.autocast(device.type, autocast)
        with torch.enable_grad(), mode:
            out = network(**arguments)
        first = next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        found = first.float().square().mean()
        loss = found if loss is None else loss + found
    assert loss is not None
    loss.backward()


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are in use."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def ignore(self, tensor: Tensor) -> None:
        """Do not count the storage of a tensor."""
        self._known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


@contextmanager
def _fake_weights(network: nn.Module, fake: FakeTensorMode, live: _Live, place: torch.device) -> Iterator[None]:
    """Replace all weights of a network by fake ones with gradients that are not counted."""
    places: list[tuple[nn.Module, str, Any]] = []
    made: dict[int, Tensor] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if type(parameter) is nn.Parameter:  # weights of other libraries keep their own data
                places.append((module, name, parameter))
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            places.append((module, name, buffer))
    for _, _, tensor in places:
        if id(tensor) not in made:
            made[id(tensor)] = _as_fake(tensor, fake, live, place)
    try:
        for module, name, tensor in places:
            setattr(module, name, made[id(tensor)])
        yield
    finally:
        for module, name, tensor in places:
            setattr(module, name, tensor)


def _as_fake(tensor: Tensor, fake: FakeTensorMode, live: _Live, place: torch.device) -> Tensor:
    with fake:
        found: Tensor = torch.empty_like(tensor, device=place, requires_grad=False)
    live.ignore(found)
    if not isinstance(tensor, nn.Parameter):
        return found
    parameter = nn.Parameter(found, requires_grad=tensor.requires_grad)
    live.ignore(parameter)
    if tensor.requires_grad:
        with fake:
            parameter.grad = torch.zeros_like(parameter)
        live.ignore(parameter.grad)
    return parameter
