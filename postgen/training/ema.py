"""Moving average of the trained weights: diffusers' `EMAModel`, by name, with a cheap swap on the device."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .sharding import cut_like, local


class Ema:
    """Average of named parameters; one for all of them, kept beside them in float32.

    Args:
        parameters: name -> parameter, in a fixed order.
        decay: highest decay, in (0, 1).
        warmup: the slower ramp of the decay, see `TrainingConfig.ema_warmup`.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float, warmup: bool) -> None:
        # Imports transformers and peft: only a run that averages pays for it.
        from diffusers.training_utils import EMAModel

        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._model = EMAModel(self._parameters, decay=decay, use_ema_warmup=warmup, foreach=True)
        if any(parameter.dtype != torch.float32 for parameter in self._parameters):
            # In bfloat16 the small differences of a slow average would be rounded away.
            self._model.to(dtype=torch.float32)

    @property
    def steps(self) -> int:
        """Updates so far."""
        return int(self._model.optimization_step)

    def update(self) -> None:
        """Take the weights of this step into the average; no transfer to the host."""
        self._model.step(self._parameters)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the average into the model; afterwards the trained weights stand there again, bit by bit."""
        targets = [local(parameter.data) for parameter in self._parameters]
        trained = [target.clone() for target in targets]
        torch._foreach_copy_(targets, [local(shadow) for shadow in self._model.shadow_params])
        try:
            yield
        finally:
            torch._foreach_copy_(targets, trained)

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages by name."""
        return dict(zip(self._names, self._model.shadow_params, strict=True))

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take averages and number of updates from a checkpoint; names and shapes must be the same."""
        for name, shadow in self.tensors().items():
            shadow.copy_(cut_like(tensors[name], shadow))
        self._model.optimization_step = steps
