"""Updates of weights: the settings that every training has, and the optimiser that they describe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from postgen.settings import Part

Optim = Literal["adamw", "adamw_8bit", "adamw_8bit_bnb", "adafactor"]
"""Names of the optimisers, which `postgen.training.optimizers` makes."""


@dataclass(kw_only=True)
class UpdatesConfig(Part):
    """Settings of steps, learning rate, optimiser, average and precision, named as in `TrainingArguments`.

    Raises:
        UserError: a value has the wrong type or is outside its range.
    """

    part: ClassVar[str] = "training"
    may_change: ClassVar[tuple[str, ...]] = ("logging_steps", "disable_tqdm")

    max_steps: int = 1000
    """Number of optimiser steps of the whole run, including steps before a resume. At least 1."""

    gradient_accumulation_steps: int = 1
    """Number of micro-batches per optimiser step; their gradients are averaged."""

    optim: Optim = "adamw"
    """Optimiser: "adamw" with float32 moments; "adamw_8bit" (needs torchao) or "adamw_8bit_bnb" (needs bitsandbytes)
    with moments of 8 bits, a quarter of the memory; "adafactor" with one second moment for each row and each column,
    and no first moments."""

    learning_rate: float = 1e-4
    """Peak learning rate, above 0."""

    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """Shape of the learning rate over `max_steps`, as in `transformers.get_scheduler`."""

    warmup_steps: int = 0
    """Steps of linear warm-up from 0. Must be 0 for "constant"."""

    weight_decay: float = 0.0
    """Decoupled weight decay. It applies only to parameters with at least two dimensions."""

    adam_beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""

    adam_beta2: float = 0.999
    """Decay of the second moment, in [0, 1)."""

    adam_epsilon: float = 1e-8
    """Added to the square root of the second moment."""

    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 disables clipping."""

    ema_decay: float = 0.0
    """Maximum decay of the moving average of the trained weights, in [0, 1); 0 keeps no average. Evaluations and
    exports use the average."""

    ema_warmup: bool = False
    """Ramp of the decay. At the n-th update the decay is 1-(1+n)^(-2/3) with True and (1+n)/(10+n) with False, but
    never above `ema_decay`."""

    bf16: bool = False
    """Run forward passes under bfloat16 autocast. Weights keep their dtype."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the training; "auto" uses the device that accelerate chooses."""

    seed: int = 42
    """Seed of all random numbers, at least 0. Each process derives its own streams from it."""

    logging_steps: int = 10
    """Write metrics every `logging_steps` steps, averaged over these steps. The device is read only then."""

    disable_tqdm: bool = False
    """Show no progress bar."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_steps", "gradient_accumulation_steps", "logging_steps"):
            self.require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("learning_rate", "adam_epsilon"):
            self.require(getattr(self, name) > 0, name, "above 0")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "seed"):
            self.require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self.require(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        if self.optim == "adafactor":
            for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
                unused = getattr(self, name) == getattr(type(self), name)
                self.require(unused, name, "left out with optim: adafactor, which has no such setting")
        warms = self.lr_scheduler_type != "constant" or self.warmup_steps == 0
        self.require(warms, "warmup_steps", '0 when lr_scheduler_type is "constant" (use "constant_with_warmup")')

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, in their order."""
        return dataclasses.asdict(self)


def decay_groups(parameters: Iterable[nn.Parameter], **settings: Any) -> list[dict[str, Any]]:
    """Return parameter groups for an optimiser; biases and gains (under two dimensions) get weight decay 0.

    Args:
        parameters: the trained parameters.
        settings: further settings of both groups, such as a learning rate.
    """
    trained = list(parameters)
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    rest = [parameter for parameter in trained if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    return [{**group, **settings} for group in groups if group["params"]]
