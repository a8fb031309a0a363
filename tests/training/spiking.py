"""The small real method with a wrong loss for a few steps, so that its loss spikes."""

from dataclasses import dataclass

from tests.training.tiny import TinyConfig, TinyTrainer


@dataclass(kw_only=True)
class SpikingConfig(TinyConfig):
    spike_at: int = 12
    """First step with a wrong loss."""

    spike_steps: int = 2
    """Number of these steps."""

    nan_gradient_at: int = 0
    """Step with a gradient that is NaN, and a loss that is finite; 0 for none."""

    second_spike_at: int = 0
    """First step of a second spike; 0 for none."""


class SpikingTrainer(TinyTrainer):
    """Its loss is wrong in one or two spikes; its gradient may be NaN."""

    config_class = SpikingConfig

    def training_step(self):
        loss, metrics = super().training_step()
        step = self.global_step + 1
        for first in filter(None, (self.args.spike_at, self.args.second_spike_at)):
            if first <= step < first + self.args.spike_steps:
                loss = 1000 * loss
        return loss, metrics

    def on_gradients(self):
        if self.global_step + 1 == self.args.nan_gradient_at:
            for value in self.trained().values():
                value.grad.fill_(float("nan"))
