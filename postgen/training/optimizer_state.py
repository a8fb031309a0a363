"""Saves and restores the state of an optimiser, by parameter name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from postgen.errors import UserError

from .checkpoint_head import DamagedCheckpoint
from .packed_states import is_packed, put_together, taken_apart
from .sharding import cut_like


class OptimizerState:
    """State of any `torch.optim.Optimizer` over named parameters.

    An optimiser may keep tensors and JSON values for each parameter, and may change JSON values of its parameter
    groups, such as a step count. All of these are saved. Group values that have not changed since the start are not
    saved, because each run configures them anew. Tensors that consist of several plain tensors, such as moments of
    8 bits, are saved as these (`packed_states`).

    Args:
        optimizer: the optimiser without accelerate's wrapper, before its first step.
        parameters: all parameters of the optimiser, by name.

    Raises:
        RuntimeError: the optimiser has a parameter that is not in `parameters`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        self.optimizer, self._parameters = optimizer, parameters
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if any(parameter not in self._names for parameter in held):
            raise RuntimeError(
                f"{self._kind} has tensors that are not trained parameters of the models that build() returned"
            )
        self._order = [self._names[parameter] for parameter in held]
        self._began = [_settings(group) for group in optimizer.param_groups]

    @property
    def _kind(self) -> str:
        return type(self.optimizer).__name__

    def check(self) -> None:
        """Check, after a step, that the whole state can be saved.

        Raises:
            UserError: a value is neither a tensor nor a JSON value, or a tensor of a sharded parameter is not sharded
                like the parameter.
        """
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                place = f"{self._kind} keeps {key!r} of {self._names[parameter]}"
                if isinstance(value, Tensor):
                    cut = isinstance(parameter, DTensor) and value.dim() > 0
                    if cut and not (isinstance(value, DTensor) and value.shape == parameter.shape):
                        raise UserError(
                            f"{place}, but not sharded like the parameter, so a checkpoint cannot store it: train "
                            "without fully_shard and FSDP, or use another optimiser."
                        )
                elif not _is_json(value):
                    raise UserError(
                        f"{place} as a {type(value).__name__}, which a checkpoint cannot store: use another optimiser."
                    )

    def tensors(self) -> dict[str, Tensor]:
        """Return the state's plain tensors by `<parameter>|<moment>`, sharded as in the optimiser.

        The parts of a packed tensor have the names `<parameter>|<moment>.<part>`.
        """
        found: dict[str, Tensor] = {}
        memory: set[int] = set()
        for name, value in self._items():
            parts = taken_apart(value)[0] if is_packed(value) else {"": value}
            for part, tensor in parts.items():
                if not isinstance(tensor, Tensor):
                    continue
                # Parameters may share a table of 8-bit numbers, but a safetensors file refuses shared memory.
                shared = tensor.device.type == "cpu" and tensor.numel() > 0 and tensor.data_ptr() in memory
                memory.add(tensor.data_ptr())
                found[f"{name}.{part}" if part else name] = tensor.clone() if shared else tensor
        return found

    def values(self) -> dict[str, Any]:
        """Return the state's JSON values: those of parameters by `<parameter>|<key>`, and changed values of groups."""
        groups = zip(self.optimizer.param_groups, self._began, strict=True)
        return {
            "kind": self._kind,
            "parameters": {name: value for name, value in self._items() if not isinstance(value, Tensor)},
            "packed": {name: taken_apart(value)[1] for name, value in self._items() if is_packed(value)},
            "groups": [
                {key: value for key, value in _settings(group).items() if began.get(key, _ABSENT) != value}
                for group, began in groups
            ],
        }

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], location: str = "it") -> None:
        """Restore what `tensors` and `values` returned.

        Args:
            tensors: whole tensors by `<parameter>|<moment>`.
            values: the return value of `values`.
            location: the origin of the state, for messages.

        Raises:
            UserError: the state belongs to another class of optimiser, or to other parameter groups.
            DamagedCheckpoint: the state belongs to other parameters, or has values of wrong types.
        """
        groups = values.get("groups", [{}] * len(self.optimizer.param_groups))
        if values.get("kind", self._kind) != self._kind or len(groups) != len(self.optimizer.param_groups):
            raise UserError(
                f"the checkpoint was written with {values['kind']} and {len(groups)} groups of parameters, this run "
                f"has {self._kind} and {len(self.optimizer.param_groups)}: use the same optimiser and trainer, "
                "or start a new run from its weights with init_from."
            )
        place = f"{location} is damaged: its optimiser state"
        tensors = _packed(dict(tensors), values.get("packed", {}), place)
        self._check_kept(tensors | values.get("parameters", {}), groups, place)
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
                raise DamagedCheckpoint(f"{place} belongs to parameters that this model does not have, such as {name}")
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
        """Restore the dtype of saved tensors, because `load_state_dict` casts them to the dtype of their parameter."""
        for name, kept in saved.items():
            state = self.optimizer.state[self._parameters[name]]
            for key, value in kept.items():
                if isinstance(value, Tensor) and isinstance(state[key], Tensor) and state[key].dtype != value.dtype:
                    state[key] = value.to(state[key].device)


_ABSENT = object()


def _packed(tensors: dict[str, Tensor], packed: Mapping[str, Any], place: str) -> dict[str, Tensor]:
    """Return the tensors with the parts of packed ones put together.

    Raises:
        DamagedCheckpoint: a part is missing, or the class of a packed tensor is unknown.
    """
    for name, told in packed.items():
        parts = {key.removeprefix(f"{name}."): tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
        try:
            tensors[name] = put_together(parts, told)
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(f"{place} has a tensor {name} that cannot be put together: {error}") from error
    return tensors


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON values of a parameter group, without the learning rate, which follows the schedule."""
    return {key: value for key, value in group.items() if key not in ("params", "lr") and _is_json(value)}


def _kind(value: Any) -> Any:
    """Return a key that is equal for interchangeable values: numbers, or lists and tuples of the same length."""
    if isinstance(value, list | tuple):
        return len(value)
    return float if isinstance(value, int | float) else type(value)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
