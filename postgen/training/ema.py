"""Moving average of the trained weights: diffusers' `EMAModel`, by name, with a cheap swap on the device."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .swap import StandIn


class Ema(StandIn):
    """Average of trained weights; one for all of them, kept beside them in float32.

    Args:
        models: by name, as they are trained.
        decay: highest decay, in (0, 1).
        warmup: the slower ramp of the decay, see `TrainingConfig.ema_warmup`.
    """

    def __init__(self, models: Mapping[str, nn.Module], decay: float, warmup: bool) -> None:
        # Imports transformers and peft: only a run that averages pays for it.
        from diffusers.training_utils import EMAModel

        super().__init__(models)
        self._model = EMAModel(self._parameters, decay=decay, use_ema_warmup=warmup, foreach=True)
        if any(parameter.dtype != torch.float32 for parameter in self._parameters):
            # In bfloat16 the small differences of a slow average would be rounded away.
            self._model.to(dtype=torch.float32)
        self.values = self._model.shadow_params

    @property
    def steps(self) -> int:
        """Updates so far."""
        return int(self._model.optimization_step)

    def update(self) -> None:
        """Take the weights of this step into the average; no transfer to the host."""
        self._model.step(self._parameters)

    def resume(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take averages and number of updates from a checkpoint; names and shapes must be the same."""
        self.load(tensors)
        self._model.optimization_step = steps
