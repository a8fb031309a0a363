"""A converted copy of a trained transformer beside it, which shares every weight that it does not train."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families.own_format import without_note
from postgen.lit.config import LiTConfig
from postgen.lit.conversion import CHILD
from postgen.lit.convert import conversion_of, convert, layers_of
from postgen.lit.saving import load

TRAINED = ("new", "attention", "all")
"""What may be trained: the new layers; all of the converted attention modules too; everything."""


def make_student(
    teacher: nn.Module,
    config: LiTConfig,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    trained: str,
    shared: bool = True,
) -> nn.Module:
    """Return a converted copy of a teacher, in evaluation mode, in which only what is trained requires a gradient.

    What is trained is float32 and the student's own. What is not is the teacher's own memory, but for values that
    `tensors` says otherwise.

    Args:
        teacher: the stock transformer; it is left as it is, and frozen.
        config: the conversion.
        tensors: trained before, of the layers or of everything (`read_student`), by their names in the student.
        trained: one of `TRAINED`.
        shared: False copies what could be shared: weights that are cut over processes must not be in two networks.

    Raises:
        UserError: as `convert`, or tensors of other layers.
    """
    teacher.requires_grad_(False)
    student = _twin(teacher, shared=shared)
    convert(student, config)
    student.requires_grad_(False).eval()
    own = {name: parameter.detach().clone().float() for name, parameter in named_parameters(student, trained).items()}
    for name, value in own.items():
        _set(student, name, nn.Parameter(value))
    give(student, tensors or {})
    return student


def read_student(folder: str | Path, teacher: nn.Module) -> tuple[LiTConfig, dict[str, Tensor]]:
    """Return the conversion and the weights of a folder that `postgen.lit.save` wrote.

    Raises:
        UserError: as `load`, or it was converted from a model with other layers or settings than the teacher.
    """
    made = load(folder)
    tensors = dict(made.state_dict())
    kept = {name: value.shape for name, value in tensors.items() if not is_new(name)}
    fresh = {name.replace(".fresh.", ".") for name in tensors if ".fresh." in name}
    theirs = {name: value.shape for name, value in teacher.state_dict().items() if name not in fresh}
    if type(made) is not type(teacher) or kept != theirs:
        raise UserError(f"{folder} was converted from another model than the teacher, a {type(teacher).__name__}")
    # Weights of the same shapes do not tell: heads are parts of one matrix, and positions may be no weights.
    own, other = _settings(made), _settings(teacher)
    if changed := [name for name in other if own.get(name) != other[name]]:
        told = ", ".join(f"{name} {own.get(name)} and not {other[name]}" for name in changed)
        raise UserError(f"{folder} was converted from a model with other settings than the teacher: {told}")
    return conversion_of(made).config, tensors


def _settings(model: Any) -> dict[str, str]:
    """Return what makes a network, as JSON has it: files have no tuples, and our note is none of its settings."""
    config = without_note(model.config)
    return {name: json.dumps(value, default=str) for name, value in config.items() if not name.startswith("_")}


@torch.no_grad()
def give(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a converted transformer weights, in memory of its own where they are not the values that it has.

    Args:
        model: which may share its weights with another one, which is left alone.
        tensors: by their names in it.

    Raises:
        UserError: it has no such weights.
    """
    there = dict(model.state_dict(keep_vars=True))
    for name, value in tensors.items():
        if name not in there or there[name].shape != value.shape:
            raise UserError(f"{name} {tuple(value.shape)} is no weight of this conversion: take the settings it had")
    for name, value in tensors.items():
        before = there[name]
        value = value.to(before.device, before.dtype)
        if not torch.equal(before, value):
            same = isinstance(before, nn.Parameter)
            _set(model, name, nn.Parameter(value, requires_grad=before.requires_grad) if same else value)


def shell_of(teacher: nn.Module, config: LiTConfig) -> nn.Module:
    """Return a converted copy of a teacher whose weights have shapes and no values, to write a student with.

    They take no memory, but on the CPU where projections begin anew: these take the place of layers that have some.
    """
    device = "meta" if config.inherit == "all" else "cpu"
    memo: dict[int, Any] = {
        id(each): nn.Parameter(torch.empty_like(each, device=device), requires_grad=False)
        for each in teacher.parameters()
    }
    shell = copy.deepcopy(teacher, memo)
    convert(shell, config)
    return shell


def named_parameters(student: nn.Module, trained: str) -> dict[str, nn.Parameter]:
    """Return the parameters of a student that are trained, by name; `is_new` tells which the teacher does not have."""
    everything = dict(student.named_parameters())
    if trained == "all":
        return everything
    modules = tuple(f"{name}." for name in layers_of(student))
    return {
        name: value
        for name, value in everything.items()
        if is_new(name) or (trained == "attention" and name.startswith(modules))
    }


def is_new(name: str) -> bool:
    """Whether a parameter of a converted transformer is one that the stock one does not have."""
    return f".{CHILD}." in f".{name}" or ".fresh." in name


def bytes_of(student: nn.Module, teacher: nn.Module) -> tuple[int, int]:
    """Return the bytes of the weights that the two share, and of those that the student alone has."""
    theirs = {id(tensor) for tensor in teacher.parameters()}
    sizes: dict[bool, int] = {True: 0, False: 0}
    for tensor in chain(student.parameters(), student.buffers()):
        sizes[id(tensor) in theirs] += tensor.nbytes
    return sizes[True], sizes[False]


def export_state(weights: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the state of a converted transformer without adapters, LoRA added to the weights that it adapts.

    Args:
        weights: all of the student's, by their names in its `state_dict`.
        scales: of the LoRA of each adapted layer, by its name.
    """
    state = {}
    for name, value in weights.items():
        if ".lora_" not in name:
            state[name.replace(".base_layer.", ".")] = value
    for name, scale in scales.items():
        up, down = (weights[f"{name}.lora_{side}.default.weight"] for side in "BA")
        base = state[f"{name}.weight"]
        state[f"{name}.weight"] = (base.float() + scale * (up.float() @ down.float())).to(base.dtype)
    return state


def lora_scales(student: nn.Module) -> dict[str, float]:
    """Return lora_alpha / lora_r of each layer that has an adapter, by its name."""
    return {
        name: float(module.scaling["default"])
        for name, module in student.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }


def _twin(teacher: nn.Module, *, shared: bool) -> nn.Module:
    """Copy the modules of a network; its weights are the same objects where they are shared. Buffers, which are small,
    are not: checkpoints keep those of both."""
    return copy.deepcopy(teacher, {id(each): each for each in teacher.parameters()} if shared else {})


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, value)
