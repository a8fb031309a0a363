"""Swaps other values into the trained weights: their moving average, an old policy, or the weights before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .sharding import cut_like, drop_gathered, local


def trained_parameters(models: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters with `requires_grad`, by `<model>.<parameter>`."""
    return {
        f"{name}.{key}": parameter
        for name, model in models.items()
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    }


class StandIn:
    """Values that can replace the trained weights of some models for a while; sharded like the weights.

    The values are copied into the memory of the weights. Tensors are not rebound, because FSDP, optimisers and CUDA
    graphs keep references to this memory. With sharded weights each process copies its own shards. FSDP keeps the
    outermost unit gathered between two passes, so the gathered weights are freed first; otherwise the next pass would
    use the old values.

    Args:
        models: trained models by name, on their device and sharded if training shards them.
    """

    values: Sequence[Tensor]
    """One tensor for each trained weight, in the same order; a subclass sets them."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self._models = list(models.values())
        drop_gathered(self._models)
        parameters = trained_parameters(models)
        self._names, self._parameters = list(parameters), list(parameters.values())

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Swap the values into the models; on exit, restore the trained weights bit by bit."""
        trained = [self._saved(parameter) for parameter in self._parameters]
        try:
            # Inside `try`, so that an interrupted write is undone as well.
            self._write(self.values)
            yield
        finally:
            self._write(trained)

    def tensors(self) -> dict[str, Tensor]:
        """Return the values by `<model>.<parameter>`."""
        return dict(zip(self._names, self.values, strict=True))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the values from whole (not sharded) tensors with the same names and shapes."""
        for name, value in self.tensors().items():
            value.copy_(cut_like(tensors[name], value))

    def _saved(self, parameter: nn.Parameter) -> Tensor:
        """Return a copy of the shard of this process of a trained weight."""
        return local(parameter).clone()

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        drop_gathered(self._models)
        # The local shards are looked up each time, because FSDP may move them in its first forward pass.
        targets = [local(parameter) for parameter in self._parameters]
        torch._foreach_copy_(targets, [local(value) for value in values])


class WeightsCopy(StandIn):
    """A copy of the trained weights at the time of its creation."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__(models)
        self.values = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def blend(self, decay: float) -> None:
        """Move the copy towards the weights: decay * copy + (1 - decay) * weights."""
        for value, parameter in zip(self.values, self._parameters, strict=True):
            local(value).lerp_(local(parameter), 1 - decay)


class HostCopy(StandIn):
    """A copy of the trained weights in the memory of the CPU, for values that are swapped in rarely.

    While the values are swapped in, the trained weights are in the memory of the CPU too. Sharded weights stay on
    their devices.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__(models)
        self.values = [
            parameter.detach().clone() if isinstance(parameter, DTensor) else self._saved(parameter)
            for parameter in self._parameters
        ]

    def _saved(self, parameter: nn.Parameter) -> Tensor:
        own = local(parameter)
        return own.clone() if isinstance(parameter, DTensor) else own.to("cpu", copy=True)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        drop_gathered(self._models)
        for parameter, value in zip(self._parameters, values, strict=True):
            local(parameter).copy_(local(value))
