"""The student: a converted copy of the trained transformer that shares every untrained weight with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from postgen.errors import UserError
from postgen.families.own_format import other_settings
from postgen.lit.config import LitConfig
from postgen.lit.conversion import CHILD
from postgen.lit.convert import conversion_of, convert, layers_of
from postgen.lit.saving import load
from postgen.training.twins import empty_copy, set_in, twin

TRAINED = ("new", "attention", "all")
"""Values of the setting `train`: the new layers; the converted attention modules with the new layers; all weights."""


def make_student(
    teacher: nn.Module,
    config: LitConfig,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    trained: str,
    shared: bool = True,
) -> nn.Module:
    """Return a converted copy of the teacher, in evaluation mode, in which only trained parameters require gradients.

    Trained parameters are float32 copies. The other parameters share the memory of the teacher, except those for which
    `tensors` has other values.

    Args:
        teacher: the stock transformer; its parameters are frozen, nothing else changes.
        config: the conversion.
        tensors: values from an earlier training, of the new layers or of all weights (`read_student`), by their names
            in the student.
        trained: one of `TRAINED`.
        shared: False copies the untrained parameters too. Sharded parameters (FSDP) must not be in two networks.

    Raises:
        UserError: see `convert`; or `tensors` belong to other layers.
    """
    teacher.requires_grad_(False)
    student = twin(teacher, shared=shared)
    convert(student, config)
    student.requires_grad_(False).eval()
    own = {name: parameter.detach().clone().float() for name, parameter in named_parameters(student, trained).items()}
    for name, value in own.items():
        set_in(student, name, nn.Parameter(value))
    give(student, tensors or {})
    return student


def read_student(folder: str | Path, teacher: nn.Module) -> tuple[LitConfig, dict[str, Tensor]]:
    """Return the settings of the conversion and the weights from a folder that `postgen.lit.save` wrote.

    Raises:
        UserError: see `load`; or the folder was converted from a model with other layers or settings than the teacher.
    """
    made = load(folder)
    tensors = dict(made.state_dict())
    kept = {name: value.shape for name, value in tensors.items() if not is_new(name)}
    fresh = {name.replace(".fresh.", ".") for name in tensors if ".fresh." in name}
    theirs = {name: value.shape for name, value in teacher.state_dict().items() if name not in fresh}
    if type(made) is not type(teacher) or kept != theirs:
        raise UserError(
            f"{folder} was converted from another model than the teacher, a {type(teacher).__name__}: set model to the"
            " model from which it was converted"
        )
    # Equal shapes are not enough: the number of heads does not change a shape, and positions may be no weights.
    if told := other_settings(made, teacher):
        raise UserError(
            f"{folder} was converted from a model with other settings than the teacher: {told}. Set model to the model"
            " from which it was converted"
        )
    return conversion_of(made).config, tensors


@torch.no_grad()
def give(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load weights into a converted transformer. Weights whose values differ get new memory.

    The model may share its weights with another model; the other model does not change.

    Args:
        model: the converted transformer.
        tensors: new values, by their names in the model.

    Raises:
        UserError: the model has no weight of this name and shape.
    """
    there = dict(model.state_dict(keep_vars=True))
    for name, value in tensors.items():
        if name not in there or there[name].shape != value.shape:
            raise UserError(
                f"{name} with the shape {tuple(value.shape)} is not a weight of this conversion: convert with the"
                " settings with which the weights were trained"
            )
    for name, value in tensors.items():
        before = there[name]
        value = value.to(before.device, before.dtype)
        if not torch.equal(before, value):
            same = isinstance(before, nn.Parameter)
            set_in(model, name, nn.Parameter(value, requires_grad=before.requires_grad) if same else value)


def shell_of(teacher: nn.Module, config: LitConfig) -> nn.Module:
    """Return a converted copy of the teacher without values, to export a student.

    Its weights are on the meta device and take no memory. With `inherit="output"` they are on the CPU, because the new
    projections replace layers that must be in memory.
    """
    shell = empty_copy(teacher, "meta" if config.inherit == "all" else "cpu")
    convert(shell, config)
    return shell


def named_parameters(student: nn.Module, trained: str) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a student, by name.

    Args:
        student: the converted transformer.
        trained: one of `TRAINED`.
    """
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
    """Whether a parameter of a converted transformer is new, so that the stock transformer does not have it."""
    return f".{CHILD}." in f".{name}" or ".fresh." in name


def export_state(weights: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the state dict of a converted transformer with LoRA merged into the weights that it adapts.

    Args:
        weights: all weights of the student, by their names in its state dict.
        scales: LoRA scale of each adapted layer, by the name of the layer.
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
    """Return the LoRA scale, lora_alpha / lora_r, of each adapted layer, by the name of the layer."""
    return {
        name: float(module.scaling["default"])
        for name, module in student.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }
