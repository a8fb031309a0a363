"""What an optimiser keeps from step to step, by the names of the parameters, into a checkpoint and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from postgen.errors import UserError

from .checkpoint_head import DamagedCheckpoint
from .sharding import cut_like


class OptimizerState:
    """State of any `torch.optim.Optimizer` over named parameters.

    An optimiser may keep tensors and JSON values for each parameter, and change JSON values of its groups (a count, an
    estimate of the rate). Everything is saved but what a run configures anew: the values that a group began with.

    Args:
        optimizer: the optimiser itself, without accelerate's wrapper, and before its first step.
        parameters: by name; all that the optimiser holds.

    Raises:
        RuntimeError: it holds something else.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        self.optimizer, self._parameters = optimizer, parameters
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if any(parameter not in self._names for parameter in held):
            raise RuntimeError(
                f"{self._kind} holds tensors that are no trained parameters of the models that build() returned"
            )
        self._order = [self._names[parameter] for parameter in held]
        self._began = [_settings(group) for group in optimizer.param_groups]

    @property
    def _kind(self) -> str:
        return type(self.optimizer).__name__

    def check(self) -> None:
        """Look after a step whether all of it can be saved.

        Raises:
            UserError: something that is neither a tensor nor a JSON value, or parts of cut weights in a form of its
                own.
        """
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                place = f"{self._kind} keeps {key!r} of {self._names[parameter]}"
                if isinstance(value, Tensor):
                    cut = isinstance(parameter, DTensor) and value.dim() > 0
                    if cut and not (isinstance(value, DTensor) and value.shape == parameter.shape):
                        raise UserError(
                            f"{place} in a form of its own, which cannot be gathered from cut weights: train without "
                            "fully_shard and FSDP, or with another optimiser."
                        )
                elif not _is_json(value):
                    raise UserError(f"{place} as a {type(value).__name__}, which no checkpoint can hold: use another.")

    def tensors(self) -> dict[str, Tensor]:
        """Return moments by `<parameter>|<moment>`, cut as they are."""
        return {name: value for name, value in self._items() if isinstance(value, Tensor)}

    def values(self) -> dict[str, Any]:
        """Return JSON values: those of parameters under the names of moments, and the changed ones of each group."""
        groups = zip(self.optimizer.param_groups, self._began, strict=True)
        return {
            "kind": self._kind,
            "parameters": {name: value for name, value in self._items() if not isinstance(value, Tensor)},
            "groups": [
                {key: value for key, value in _settings(group).items() if began.get(key, _ABSENT) != value}
                for group, began in groups
            ],
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], location: str = "it") -> None:
        """Take back what `tensors` and `values` returned.

        Args:
            tensors: by `<parameter>|<moment>`.
            values: the rest.
            location: what they come from, for errors.

        Raises:
            UserError: they are of another optimiser, or of one with other groups.
            DamagedCheckpoint: they are of other parameters, or no such values.
        """
        groups = values.get("groups", [{}] * len(self.optimizer.param_groups))
        if values.get("kind", self._kind) != self._kind or len(groups) != len(self.optimizer.param_groups):
            raise UserError(
                f"the checkpoint was written with {values['kind']} and {len(groups)} groups of parameters, this run "
                f"has {self._kind} and {len(self.optimizer.param_groups)}: use the trainer that wrote it."
            )
        self._check_kept(tensors | values.get("parameters", {}), groups, f"{location} is damaged: its optimiser state")
        saved: dict[str, dict[str, Any]] = {}
        for name, value in (tensors | values.get("parameters", {})).items():
            parameter, _, key = name.rpartition("|")
            cut = cut_like(value, self._parameters[parameter]) if isinstance(value, Tensor) else value
            saved.setdefault(parameter, {})[key] = cut
        state = self.optimizer.state_dict()
        state["state"] = {index: saved[name] for index, name in enumerate(self._order) if name in saved}
        self.optimizer.load_state_dict(state)
        self._undo_casts(saved)
        for group, changed in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(changed)

    def _check_kept(self, kept: Mapping[str, Any], groups: list[Mapping[str, Any]], place: str) -> None:
        for name in kept:
            if name.rpartition("|")[0] not in self._parameters:
                raise DamagedCheckpoint(f"{place} is of other parameters than this model's, as {name}")
        for group, changed in zip(self.optimizer.param_groups, groups, strict=True):
            for key, value in changed.items():
                kinds = [_kind(one) for one in (value, group.get(key, value))]
                if key == "params" or kinds[0] != kinds[1]:
                    raise DamagedCheckpoint(f"{place} has {key} {value!r}")

    def _items(self) -> list[tuple[str, Any]]:
        return [
            (f"{self._names[parameter]}|{key}", value)
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        ]

    def _undo_casts(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Give moments their own number type back: torch loads them in that of their parameter."""
        for name, kept in saved.items():
            state = self.optimizer.state[self._parameters[name]]
            for key, value in kept.items():
                if isinstance(value, Tensor) and isinstance(state[key], Tensor) and state[key].dtype != value.dtype:
                    state[key] = value.to(state[key].device)


_ABSENT = object()


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON values of a group but for its rate, which follows the schedule."""
    return {key: value for key, value in group.items() if key not in ("params", "lr") and _is_json(value)}


def _kind(value: Any) -> Any:
    """Return what is equal for values of which one can stand for the other; JSON knows lists alone."""
    if isinstance(value, list | tuple):
        return len(value)
    return float if isinstance(value, int | float) else type(value)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
