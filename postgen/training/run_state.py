"""The parts of a run that training changes (modules, AdamW, schedule, average), into a checkpoint and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError

from .checkpoint import Snapshot, check_names
from .config import TrainingConfig
from .ema import Ema
from .sharding import cut_like, whole

_RUN_ONLY = {"output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to", "max_seconds", "save_seconds"}
"""Settings that do not change what is learned."""


def trained_parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient by `<model>.<parameter>`."""
    return {
        f"{name}.{key}": parameter
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def changed_settings(before: Mapping[str, Any], config: TrainingConfig) -> list[str]:
    """Return `name: old -> new` for the settings of `config` that differ from those of a checkpoint."""
    return [
        f"{name}: {before.get(name)} -> {value}"
        for name, value in config.to_dict().items()
        if name not in _RUN_ONLY and before.get(name) != value
    ]


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

    def __post_init__(self) -> None:
        """Name the trained parameters once: walking the modules at each step would cost time."""
        self.named = trained_parameters(self.modules)
        self.parameters = list(self.named.values())
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in self.named.items()}

    def snapshot(self, step: int, ranks: list[dict[str, Any]], meta: Mapping[str, Any]) -> Snapshot:
        """Return the state after `step` steps with the parts that the caller collected; no tensor is copied.

        With sharded weights every process must call this.
        """
        moments = {
            f"{self._names[parameter]}|{key}": whole(value)
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        return Snapshot(
            step=step,
            weights={name: whole(tensor) for name, tensor in self._tensors().items()},
            ema={name: whole(tensor) for name, tensor in self.ema.tensors().items()} if self.ema else {},
            optimizer=moments,
            ranks=ranks,
            meta={**meta, "ema_steps": self.ema.steps if self.ema else 0},
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
        """
        tensors = self._tensors()
        check_names(snapshot.weights, tensors, location)
        if bool(snapshot.ema) != (self.ema is not None):
            has = "has" if snapshot.ema else "has no"
            raise UserError(f"{location} {has} averaged weights: set ema_decay as in the run that wrote it.")
        for name, tensor in tensors.items():
            tensor.copy_(cut_like(snapshot.weights[name], tensor))
        if self.ema is not None:
            self.ema.load(snapshot.ema, snapshot.meta["ema_steps"])
        self._restore_moments(snapshot.optimizer)
        self.scheduler.last_epoch = snapshot.step
        rates = zip(self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        for group, base, shape in rates:
            group["lr"] = base * shape(snapshot.step)

    @torch.no_grad()
    def whole_weights(self) -> dict[str, dict[str, Tensor]]:
        """Return all weights by model and name, on the CPU; every process must call this."""
        return {
            name: {key: whole(value.detach()).cpu() for key, value in module.state_dict().items()}
            for name, module in self.modules.items()
        }

    def _tensors(self) -> dict[str, Tensor]:
        """Return trained parameters, and buffers that belong to the state."""
        found: dict[str, Tensor] = dict(self.named)
        for name, module in self.modules.items():
            parameters = {key for key, _ in module.named_parameters(remove_duplicate=False)}
            found |= {f"{name}.{key}": value for key, value in module.state_dict().items() if key not in parameters}
        return found

    def _restore_moments(self, tensors: Mapping[str, Tensor]) -> None:
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition("|")
            by_parameter.setdefault(parameter, {})[key] = tensor
        order = [self._names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]
        state = self.optimizer.state_dict()
        state["state"] = {
            index: {key: cut_like(value, self.named[name]) for key, value in by_parameter[name].items()}
            for index, name in enumerate(order)
            if name in by_parameter
        }
        self.optimizer.load_state_dict(state)
