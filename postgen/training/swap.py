"""Other values in the place of trained weights: their average, an older policy, the weights before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .sharding import cut_like, drop_gathered, local


def trained_parameters(models: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient by `<model>.<parameter>`."""
    return {
        f"{name}.{key}": parameter
        for name, model in models.items()
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    }


class StandIn:
    """Values that can take the place of the trained weights of some models, cut over the processes as these are.

    Values are copied into the memory of the weights and nothing is bound anew, because FSDP, optimisers and recorded
    graphs hold on to that memory. With cut weights each process copies its own parts, and what FSDP has gathered
    before is dropped: it leaves the outermost part whole between two passes, and would go on with the values of then.

    Args:
        models: by name, as they are trained: on their device and, where they are, cut.
    """

    values: Sequence[Tensor]
    """One for each trained weight, in their order; a subclass sets them."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self._models = list(models.values())
        drop_gathered(self._models)
        parameters = trained_parameters(models)
        self._names, self._parameters = list(parameters), list(parameters.values())

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the values into the models; afterwards the trained weights stand there again, bit by bit."""
        trained = [local(parameter).clone() for parameter in self._parameters]
        try:
            # Stopped half-way, it is undone too.
            self._write(self.values)
            yield
        finally:
            self._write(trained)

    def tensors(self) -> dict[str, Tensor]:
        """Return the values by `<model>.<parameter>`."""
        return dict(zip(self._names, self.values, strict=True))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take whole values of the same names and shapes."""
        for name, value in self.tensors().items():
            value.copy_(cut_like(tensors[name], value))

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        drop_gathered(self._models)
        # The local parts are asked for each time: FSDP may move them in its first pass.
        targets = [local(parameter) for parameter in self._parameters]
        torch._foreach_copy_(targets, [local(value) for value in values])


class WeightsCopy(StandIn):
    """A copy of the trained weights as they are now."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__(models)
        self.values = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def blend(self, decay: float) -> None:
        """Move the copy towards the weights: decay * copy + (1 - decay) * weights."""
        for value, parameter in zip(self.values, self._parameters, strict=True):
            local(value).lerp_(local(parameter), 1 - decay)
