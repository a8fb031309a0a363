"""Frozen components of a pipeline in main memory, each on the device only while it is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from postgen.compat.placement import fixed

_METHODS = ("forward", "encode", "decode")
"""Methods of text encoders, image encoders and autoencoders that pipelines call."""


class Parking:
    """Keeps components in main memory. A call of one moves its weights to the device.

    They stay there, for the next call, until another of these components is called or a network runs. The weights
    must not change: the device has a copy, which is dropped. A conversion of the pipeline (`pipe.to(device)`) does not
    move them. A component for which the device has too little memory runs in main memory, with a warning.

    Args:
        parts: the components, such as text encoders and the autoencoder, in eval mode and frozen.
        networks: the networks whose forward pass needs the memory: the denoisers.
        device: the device.
    """

    def __init__(self, parts: Iterable[nn.Module], networks: Iterable[nn.Module], device: torch.device) -> None:
        self.device = device
        self.parts = list(parts)
        self._here: nn.Module | None = None
        self._too_large: set[nn.Module] = set()
        self._home: list[tuple[Tensor, Tensor]] = []
        self._undo: list[Callable[[], None]] = []
        for part in self.parts:
            part.to("cpu")
            self._undo.append(fixed(part))
            for name in _METHODS:
                if callable(getattr(part, name, None)):
                    self._wrap(part, name)
            _PARKINGS[part] = ref(self)
        for network in networks:
            self._undo.append(network.register_forward_pre_hook(lambda *_: self.park()).remove)

    @torch.no_grad()
    def bring(self, part: nn.Module) -> torch.device:
        """Move a component to the device, and the one there back to main memory; return where the component is then.

        It stays in main memory if the device has too little memory for its weights.
        """
        if self._here is part:
            return self.device
        self.park()
        if part in self._too_large:
            return torch.device("cpu")
        self._home = [(tensor, tensor.data) for tensor in (*part.parameters(), *part.buffers())]
        try:
            for tensor, data in self._home:
                tensor.data = self._moved(data)
        except torch.OutOfMemoryError:
            self.park()
            self._too_large.add(part)
            size = sum(tensor.nbytes for tensor in part.parameters()) / 2**30
            warnings.warn(
                f"the {type(part).__name__} needs {size:.1f} GiB, more than the device has free: it runs in main"
                " memory, which is slower",
                stacklevel=2,
            )
            return torch.device("cpu")
        self._here = part
        return self.device

    def _moved(self, data: Tensor) -> Tensor:
        return data.to(self.device)

    @torch.no_grad()
    def park(self) -> None:
        """Drop the copy on the device."""
        for tensor, data in self._home:
            tensor.data = data
        self._home, self._here = [], None

    def remove(self) -> None:
        """Move all components to the device for good."""
        self.park()
        for undo in self._undo:
            undo()
        self._undo = []
        for part in self.parts:
            _PARKINGS.pop(part, None)
            part.to(self.device)

    def _wrap(self, part: nn.Module, name: str) -> None:
        call: Callable[..., Any] = getattr(part, name)
        own = name in vars(part)

        @wraps(call)
        def brought(*args: Any, **kwargs: Any) -> Any:
            place = self.bring(part)
            args, kwargs = tree_map_only(Tensor, lambda each: each.to(place), (args, kwargs))
            return call(*args, **kwargs)

        vars(part)[name] = brought

        def undo() -> None:
            vars(part)[name] = call
            if not own:
                del vars(part)[name]

        self._undo.append(undo)


_PARKINGS: WeakKeyDictionary[nn.Module, ref[Parking]] = WeakKeyDictionary()
"""Component -> what keeps it in main memory. The methods of the component hold that; a reference from here would hold
the components, too."""


def parking_of(part: nn.Module) -> Parking | None:
    """Return what keeps a component in main memory, or None."""
    found = _PARKINGS.get(part)
    return None if found is None else found()
