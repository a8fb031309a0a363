"""Moving average of the trained weights: diffusers' `EMAModel` with named tensors and a swap on the device."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .swap import StandIn


class Ema(StandIn):
    """Moving average of all trained weights, kept in float32 on the same device.

    Args:
        models: prepared or raw models by name, on their device and sharded if training shards them.
        decay: maximum decay, in (0, 1).
        warmup: ramp of the decay, see `UpdatesConfig.ema_warmup`.
    """

    def __init__(self, models: Mapping[str, nn.Module], decay: float, warmup: bool) -> None:
        # This import loads transformers and peft, so it happens only in runs that keep an average.
        from diffusers.training_utils import EMAModel

        super().__init__(models)
        self._model = EMAModel(self._parameters, decay=decay, use_ema_warmup=warmup, foreach=True)
        if any(parameter.dtype != torch.float32 for parameter in self._parameters):
            # In bfloat16 the small differences of a slow average would be rounded away.
            self._model.to(dtype=torch.float32)
        self.values = self._model.shadow_params

    @property
    def steps(self) -> int:
        """Number of updates so far."""
        return int(self._model.optimization_step)

    def update(self) -> None:
        """Update the average with the weights of this step, without a transfer to the host."""
        self._model.step(self._parameters)

    def resume(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Restore averages and number of updates from a checkpoint; names and shapes must match."""
        self.load(tensors)
        self._model.optimization_step = steps
