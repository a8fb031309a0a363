"""The small real method with an evaluation on fixed samples."""

import os
import signal
from dataclasses import dataclass
from typing import ClassVar

import torch

from tests.training.tiny import TinyConfig, TinyTrainer


@dataclass(kw_only=True)
class MeasuredConfig(TinyConfig):
    may_change: ClassVar[tuple[str, ...]] = ("kill_on_trial",)

    kill_on_trial: bool = False
    """Whether the process kills itself while it evaluates merged weights."""


class MeasuredTrainer(TinyTrainer):
    config_class = MeasuredConfig

    def evaluate(self):
        if self.on_trial and self.args.kill_on_trial:
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        error = float((self.unwrap("net")(x) - x.sum(1, keepdim=True)).square().mean())
        return {"loss": error, "score": -error}
