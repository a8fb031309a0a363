"""How weights are updated: the settings that everything which trains has, and the optimiser that they describe."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from postgen.settings import Part


@dataclass(kw_only=True)
class UpdatesConfig(Part):
    """Steps, rates, optimiser, average, precision; the names are those of `transformers.TrainingArguments`.

    Raises:
        UserError: a value has the wrong type or lies outside its range.
    """

    part: ClassVar[str] = "training"
    may_change: ClassVar[tuple[str, ...]] = ("logging_steps", "disable_tqdm")

    max_steps: int = 1000
    """Optimiser steps of the whole run, those before a resume included. At least 1."""

    gradient_accumulation_steps: int = 1
    """Micro-batches whose mean gradient makes one optimiser step."""

    learning_rate: float = 1e-4
    """Peak learning rate of AdamW, above 0."""

    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """Shape of the learning rate over `max_steps`, as in `transformers.get_scheduler`."""

    warmup_steps: int = 0
    """Steps of linear warm-up from 0; without effect for "constant", where it must be 0."""

    weight_decay: float = 0.0
    """AdamW's decoupled decay, on parameters with at least two dimensions only."""

    adam_beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""

    adam_beta2: float = 0.999
    """Decay of the second moment, in [0, 1)."""

    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them as they are."""

    ema_decay: float = 0.0
    """Highest decay of the moving average of the trained weights, in [0, 1); 0 keeps none. Evaluated and exported."""

    ema_warmup: bool = False
    """Decay of the n-th update: with True 1-(1+n)^(-2/3), with False (1+n)/(10+n), never above `ema_decay`."""

    bf16: bool = False
    """Run the models' forward passes under bfloat16 autocast; weights stay as they are."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; "auto" takes what accelerate finds."""

    seed: int = 42
    """Seed of everything random; each process derives its own streams from it. At least 0."""

    logging_steps: int = 10
    """Metrics are averaged over this many steps and written. Numbers leave the device only then."""

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
        warms = self.lr_scheduler_type != "constant" or self.warmup_steps == 0
        self.require(warms, "warmup_steps", '0 when lr_scheduler_type is "constant" (use "constant_with_warmup")')

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, in their order."""
        return dataclasses.asdict(self)


def decay_groups(parameters: Iterable[nn.Parameter], **settings: Any) -> list[dict[str, Any]]:
    """Return groups of an optimiser: biases and gains (fewer than two dimensions) do not decay.

    Args:
        parameters: the trained ones.
        settings: of both groups, a rate for instance.
    """
    trained = list(parameters)
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    rest = [parameter for parameter in trained if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    return [{**group, **settings} for group in groups if group["params"]]


def adamw(groups: list[dict[str, Any]], args: UpdatesConfig, device: torch.device) -> torch.optim.AdamW:
    """Return AdamW of these groups by the configuration."""
    # Fused needs a GPU; foreach is its equal elsewhere.
    kind = {"fused": True} if device.type == "cuda" else {"foreach": True}
    return torch.optim.AdamW(
        groups,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        **kind,
    )
