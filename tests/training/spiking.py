"""The small real method with a wrong loss for a few steps, so that its loss spikes."""

from dataclasses import dataclass

from tests.training.tiny import TinyConfig, TinyTrainer


@dataclass(kw_only=True)
class SpikingConfig(TinyConfig):
    spike_at: int = 12
    """First step with a wrong loss."""

    spike_steps: int = 2
    """Number of these steps."""


class SpikingTrainer(TinyTrainer):
    config_class = SpikingConfig

    def training_step(self):
        loss, metrics = super().training_step()
        step = self.global_step + 1
        if self.args.spike_at <= step < self.args.spike_at + self.args.spike_steps:
            loss = 1000 * loss
        return loss, metrics
