"""A small real method: a two-layer network learns the sum of four random numbers."""

import os
import random
import signal
import weakref
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from postgen.training import Trainer, TrainingConfig


@dataclass(kw_only=True)
class TinyConfig(TrainingConfig):
    may_change: ClassVar[tuple[str, ...]] = ("signal_at", "signal_name")

    width: int = 8
    """Number of hidden units."""

    dropout: float = 0.1
    """Dropout probability; dropout makes the loss depend on torch's global RNG state."""

    frozen: bool = False
    """Whether to freeze the first layer."""

    raw_pass: bool = False
    """Whether to bypass `models`, a mistake by which processes do not average their gradients."""

    signal_at: int = 0
    """Number of steps after which the process sends itself `signal_name`; 0 for never."""

    signal_name: str = "SIGKILL"
    """Name of the signal."""

    nan_at: int = 0
    """Step whose loss is NaN; 0 for none."""


class TinyTrainer(Trainer[TinyConfig]):
    config_class = TinyConfig

    def build(self):
        self.cursor = 0
        self.drawn = torch.zeros(())
        self.history = []
        self.seen = []
        net = nn.Sequential(
            nn.Linear(4, self.args.width), nn.Tanh(), nn.Dropout(self.args.dropout), nn.Linear(self.args.width, 1)
        )
        net[0].requires_grad_(not self.args.frozen)
        return {"net": net}

    def training_step(self):
        size = self.args.per_device_train_batch_size
        # Draw samples one by one, so that they do not depend on the batch size.
        x = torch.stack([torch.randn(4, generator=self.generator, device=self.device) for _ in range(size)])
        self.cursor += size
        self.drawn = self.drawn + x.sum().cpu()
        self.seen.append(x)
        noise = 0.01 * (random.random() + np.random.rand() + torch.rand(()).item())
        net = self.unwrap("net") if self.args.raw_pass else self.models["net"]
        loss = (net(x).float() - x.sum(1, keepdim=True)).square().mean() * (1 + noise * bool(self.args.dropout))
        if self.global_step + 1 == self.args.nan_at:
            loss = loss * float("nan")
        return loss, {"size": size, "root": loss.detach().sqrt()}

    def on_optimizer_step(self):
        self.history.append({name: value.detach().clone() for name, value in self.trained().items()})
        if self.global_step == self.args.signal_at:
            os.kill(os.getpid(), signal.Signals[self.args.signal_name])

    def evaluate(self):
        assert not self.unwrap("net").training
        torch.rand(3)
        torch.rand(3, generator=self.generator, device=self.device)
        return {"bias": float(self.unwrap("net")[3].bias)}

    def export(self, folder, weights):
        save_file(weights["net"], folder / "net.safetensors")

    def state_dict(self):
        return {"cursor": self.cursor, "drawn": self.drawn}

    def load_state_dict(self, state):
        self.cursor, self.drawn = state["cursor"], state["drawn"]


class WitnessTrainer(TinyTrainer):
    """Writes the weights of each process after the first step; checks that DDP is removed before the group ends."""

    def train(self):
        end_group = torch.distributed.destroy_process_group

        def watched(group=None):
            assert self.wrapper() is None, "DDP outlives its group, so that leaving can hang"
            end_group(group)

        torch.distributed.destroy_process_group = watched
        try:
            return super().train()
        finally:
            # Other tests of this process use other groups.
            torch.distributed.destroy_process_group = end_group

    def on_optimizer_step(self):
        super().on_optimizer_step()
        self.wrapper = weakref.ref(self.models["net"])
        if self.global_step == 1:
            weights = {name: value.detach() for name, value in self.trained().items()}
            path = self.args.folder / f"rank-{self.accelerator.process_index}.safetensors"
            save_file({**weights, "data": torch.stack(self.seen)}, path)
