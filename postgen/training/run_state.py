"""The parts of a run that training changes (modules, optimiser, schedule, average), into a checkpoint and back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError

from .checkpoint import Snapshot, check_names
from .checkpoint_head import DamagedCheckpoint
from .ema import Ema
from .optimizer_state import OptimizerState
from .sharding import cut_like, gathered, whole
from .swap import WeightsCopy, trained_parameters

Weights = dict[str, dict[str, Tensor]]
"""Tensors by model and by the name in its `state_dict`, each of them whole."""


@dataclass(kw_only=True)
class RunState:
    """What changes from step to step and is equal in every process."""

    modules: Mapping[str, nn.Module]
    """Trained modules by name, without accelerate's wrappers."""

    optimizer: torch.optim.Optimizer
    """The optimiser itself, without accelerate's wrapper."""

    scheduler: torch.optim.lr_scheduler.LambdaLR
    """Schedule of the learning rate."""

    ema: Ema | None
    """Average of the trained weights."""

    copies: Mapping[str, WeightsCopy] = field(default_factory=dict)
    """Copies of the trained weights that the method keeps."""

    def __post_init__(self) -> None:
        """Name the trained parameters once: walking the modules at each step would cost time."""
        self.named = trained_parameters(self.modules)
        self.parameters = list(self.named.values())
        self.optimizer_state = OptimizerState(self.optimizer, self.named)

    @torch.no_grad()
    def snapshot(self, step: int, ranks: list[dict[str, Any]], meta: Mapping[str, Any], *, keep: bool) -> Snapshot:
        """Return the state after `step` steps with the parts that the caller collected; whole tensors are not copied.

        With sharded weights every process must call this.

        Args:
            step: optimiser steps done.
            ranks: what each process keeps for itself.
            meta: JSON values.
            keep: whether this process writes it; that of another one has no tensors.
        """
        return Snapshot(
            step=step,
            weights=gathered(self._tensors(), keep=keep),
            ema=gathered(self.ema.tensors(), keep=keep) if self.ema else {},
            copies=gathered(self._copies(), keep=keep),
            optimizer=gathered(self.optimizer_state.tensors(), keep=keep),
            ranks=ranks,
            meta={
                **meta,
                "ema_steps": self.ema.steps if self.ema else 0,
                "optimizer": self.optimizer_state.values(),
            },
        )

    @torch.no_grad()
    def checksum(self) -> float:
        """Return a number that two processes share when their trained weights are equal. Waits for the device."""
        return float(torch.stack([whole(parameter.double().abs().sum()) for parameter in self.parameters]).sum())

    @torch.no_grad()
    def restore(self, snapshot: Snapshot, location: str) -> None:
        """Take the values of a checkpoint. Learning rate, decay and the like stay as this run was configured.

        Raises:
            UserError: names or shapes differ, or only one of the two keeps an average. The message names `location`.
            DamagedCheckpoint: the weights fit, but the average, or what the optimiser keeps, belongs to others.
        """
        tensors = self._tensors()
        check_names(snapshot.weights, tensors, location)
        check_names(snapshot.copies, self._copies(), location)
        if bool(snapshot.ema) != (self.ema is not None):
            has = "has" if snapshot.ema else "has no"
            raise UserError(f"{location} {has} averaged weights: set ema_decay as in the run that wrote it.")
        if self.ema is not None:
            _check_kept(snapshot.ema, self.ema.tensors(), f"{location} is damaged: ema.safetensors")
        for name, tensor in tensors.items():
            tensor.copy_(cut_like(snapshot.weights[name], tensor))
        if self.ema is not None:
            self.ema.resume(snapshot.ema, snapshot.meta["ema_steps"])
        for name, copy in self.copies.items():
            copy.load({key: snapshot.copies[f"{name}|{key}"] for key in copy.tensors()})
        self.optimizer_state.restore(snapshot.optimizer, snapshot.meta.get("optimizer", {}), location)
        self.scheduler.last_epoch = snapshot.step
        rates = zip(self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        for group, base, shape in rates:
            group["lr"] = base * shape(snapshot.step)

    @torch.no_grad()
    def whole_weights(self, *, keep: bool) -> Weights:
        """Return all weights by model and name as `sharding.gathered` does; with cut ones every process calls this."""
        return {name: gathered(module.state_dict(), keep=keep) for name, module in self.modules.items()}

    def _tensors(self) -> dict[str, Tensor]:
        """Return trained parameters, and buffers that belong to the state."""
        found: dict[str, Tensor] = dict(self.named)
        for name, module in self.modules.items():
            parameters = {key for key, _ in module.named_parameters(remove_duplicate=False)}
            found |= {f"{name}.{key}": value for key, value in module.state_dict().items() if key not in parameters}
        return found

    def _copies(self) -> dict[str, Tensor]:
        return {f"{name}|{key}": value for name, copy in self.copies.items() for key, value in copy.tensors().items()}


def _check_kept(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], location: str) -> None:
    try:
        check_names(found, wanted, location)
    except UserError as error:
        raise DamagedCheckpoint(str(error)) from error
