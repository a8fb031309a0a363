"""Saves and restores what training changes: modules, optimiser, learning rate schedule, average, copies of weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError

from .base_quant import constant_in
from .checkpoint import Snapshot, check_names
from .checkpoint_head import DamagedCheckpoint
from .ema import Ema
from .optimizer_state import OptimizerState
from .sharding import cut_like, drop_gathered, gathered, whole
from .swap import HostCopy, WeightsCopy, trained_parameters

Weights = dict[str, dict[str, Tensor]]
"""State dict of each model, by model name, with whole (not sharded) tensors."""


@dataclass(kw_only=True)
class RunState:
    """State that changes from step to step and is the same in every process."""

    modules: Mapping[str, nn.Module]
    """Trained modules by name, without accelerate's wrappers."""

    optimizer: torch.optim.Optimizer
    """The optimiser without accelerate's wrapper."""

    scheduler: torch.optim.lr_scheduler.LambdaLR
    """Schedule of the learning rate."""

    ema: Ema | None
    """Moving average of the trained weights; None if the run keeps none."""

    copies: Mapping[str, WeightsCopy] = field(default_factory=dict)
    """Copies of the trained weights that the method keeps."""

    merged: HostCopy | None = None
    """Average of checkpoints that replaces the trained weights in evaluations and exports; None if there is none."""

    merge_report: dict[str, Any] = field(default_factory=dict)
    """What the merge of checkpoints did, JSON values; empty without a merge."""

    def __post_init__(self) -> None:
        """Collect the trained parameters once, because walking through the modules at each step would cost time."""
        self.named = trained_parameters(self.modules)
        self.parameters = list(self.named.values())
        self.optimizer_state = OptimizerState(self.optimizer, self.named)

    @torch.no_grad()
    def snapshot(self, step: int, ranks: list[dict[str, Any]], meta: Mapping[str, Any], *, keep: bool) -> Snapshot:
        """Return a snapshot of the state. Tensors that are not sharded are not copied.

        With sharded weights every process must call this.

        Args:
            step: optimiser steps done.
            ranks: each process's own state.
            meta: JSON values to add to those of this state.
            keep: whether this process writes the snapshot; otherwise the snapshot has no tensors.
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
        """Return a checksum of the trained weights, to compare between processes. Synchronises with the device."""
        return float(torch.stack([whole(parameter.double().abs().sum()) for parameter in self.parameters]).sum())

    @torch.no_grad()
    def restore(self, snapshot: Snapshot, location: str) -> None:
        """Restore the values of a checkpoint. Learning rate, weight decay and the like stay as configured in this run.

        Args:
            snapshot: the checkpoint.
            location: name of the checkpoint, for messages.

        Raises:
            UserError: names or shapes of weights differ, or only one of checkpoint and run keeps an average.
            DamagedCheckpoint: the weights fit, but the average or the optimiser state belongs to other weights.
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

    @contextmanager
    def exported(self) -> Iterator[None]:
        """Swap in the weights of evaluations and exports: merged checkpoints, the moving average, or nothing else."""
        average = self.merged or (self.ema if self.ema is not None and self.ema.steps else None)
        if average is None:
            yield
        else:
            with average.swapped_in():
                yield

    @torch.no_grad()
    def rewind(
        self, snapshot: Snapshot, weights: Mapping[str, Tensor], step: int, models: Mapping[str, nn.Module]
    ) -> None:
        """Go back to a checkpoint with other weights and without moments; the schedule stays at its step.

        Args:
            snapshot: the checkpoint, for buffers, averages and copies of the weights.
            weights: whole trained parameters by name.
            step: optimiser steps done.
            models: the prepared models.
        """
        drop_gathered(models.values())
        meta = {**snapshot.meta, "optimizer": {}}
        self.restore(replace(snapshot, step=step, optimizer={}, meta=meta), f"the checkpoint of step {snapshot.step}")
        for name, parameter in self.named.items():
            parameter.copy_(cut_like(weights[name], parameter))

    @torch.no_grad()
    def whole_weights(self, *, keep: bool) -> Weights:
        """Return the state dict of each model with whole tensors, see `sharding.gathered`.

        With sharded weights every process must call this.
        """
        return {name: gathered(module.state_dict(), keep=keep) for name, module in self.modules.items()}

    def _tensors(self) -> dict[str, Tensor]:
        """Return the trained parameters, and the buffers in the state dicts, by `<model>.<name>`.

        Buffers of a quantised base (`base_quant`) are left out, because they never change.
        """
        found: dict[str, Tensor] = dict(self.named)
        for name, module in self.modules.items():
            parameters = {key for key, _ in module.named_parameters(remove_duplicate=False)}
            state, constant = module.state_dict(), constant_in(module)
            buffers = [key for key in state if key not in parameters and not key.startswith(constant)]
            found |= {f"{name}.{key}": state[key] for key in buffers}
        return found

    def _copies(self) -> dict[str, Tensor]:
        return {f"{name}|{key}": value for name, copy in self.copies.items() for key, value in copy.tensors().items()}


def _check_kept(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], location: str) -> None:
    try:
        check_names(found, wanted, location)
    except UserError as error:
        raise DamagedCheckpoint(str(error)) from error
