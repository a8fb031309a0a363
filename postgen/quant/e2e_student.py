"""The student of the training method `quant`: a quantised copy of the teacher whose scales are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from postgen.errors import UserError, first_line
from postgen.families.own_format import load_part, other_settings
from postgen.quant.linear import QLinear
from postgen.quant.trained_scales import DOWN, GAIN, SCALE, UP, ScaleLinear, parts_of, scale_layers, trained_weight
from postgen.training.twins import set_in

_LORA_INIT = 1 / 16
"""Standard deviation of the first values of a branch's matrix `down` if `up` begins as 0, times the square root of the
input channels."""


def read_quantized(folder: str | Path, name: str, teacher: nn.Module) -> nn.Module:
    """Load a quantised network to train.

    Args:
        folder: the folder of the network, or of a model or export that contains it.
        name: name of the network in the model, such as "transformer".
        teacher: the exact network.

    Raises:
        UserError: the folder cannot be loaded, it is not quantised by postgen, or it belongs to another model.
    """
    place = Path(folder).expanduser()
    if (place / name / "config.json").is_file():
        place = place / name
    if not (place / "config.json").is_file():
        raise UserError(f"student: {folder} holds no quantised network: give the output of postgen convert quant")
    dtype = next(parameter.dtype for parameter in teacher.parameters() if parameter.is_floating_point())
    try:
        network: nn.Module = load_part(place.absolute().parent, place.name, dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"student: {folder} cannot be loaded: {first_line(error)}") from error
    if not any(isinstance(module, QLinear) for module in network.modules()):
        raise UserError(
            f"student: {folder} has no layers that postgen has quantised: give the output of postgen convert quant"
        )
    if type(network) is not type(teacher) or (told := other_settings(network, teacher)):
        told = type(network).__name__ if type(network) is not type(teacher) else told
        raise UserError(
            f"student: {folder} was quantised from another model than the teacher ({told}): set model to the model"
            " that was quantised"
        )
    return network.eval()


def freeze_(student: nn.Module) -> None:
    """Freeze all parameters but the trained ones of the layers with trained scales."""
    student.requires_grad_(False)
    for layer in scale_layers(student).values():
        for key in (SCALE, UP, DOWN):
            if (tensor := getattr(layer, key)) is not None:
                tensor.requires_grad_(True)


@torch.no_grad()
def add_branches_(student: nn.Module, teacher: nn.Module | None, rank: int, generator: torch.Generator) -> None:
    """Add an auxiliary branch to each layer with trained scales.

    Args:
        student: the student.
        teacher: the exact network, whose weights the codes come from: a branch begins as the largest part of what
            rounding has lost (SVD). None: the product of a branch begins as 0.
        rank: rank of the branches, at most the number of channels of a layer.
        generator: source of the first values without a teacher, on the CPU.

    Raises:
        UserError: a layer has an exact low-rank branch already.
    """
    for name, layer in scale_layers(student).items():
        if layer.branch_up is not None:
            raise UserError(
                f"branch_rank is {rank}, but {name} has a low-rank branch already: leave branch_rank out, or quantise"
                " with rank: 0"
            )
        if layer.trained_scale is None:
            continue
        size = min(rank, layer.in_features, layer.out_features)
        device = layer.weight.device
        if teacher is None:
            down = torch.randn(size, layer.in_features, generator=generator).to(device)
            layer.add_branch_(torch.zeros(layer.out_features, size, device=device), down * _LORA_INIT)
            continue
        exact: Any = teacher.get_submodule(name)
        lost = exact.weight.float() - layer.effective_weight()
        scale = layer.input_scale
        if scale is not None:
            lost = lost * scale.view(torch.float32)
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        root = values[:size].sqrt()
        layer.add_branch_(left[:, :size] * root, root[:, None] * right[:size])


@torch.no_grad()
def fill_(shell: nn.Module, student: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Fill an empty quantised network with the weights of a trained student, and return it.

    Args:
        shell: the network with `QLinear` layers; its parameters may have no values.
        student: the student.
        weights: the state dict of the student with whole tensors.
    """
    from postgen.quant.hf import mark_quantized  # it imports diffusers

    trained = scale_layers(student)
    state = {name: value for name, value in weights.items() if name.rpartition(".")[0] not in trained}
    for name, layer in trained.items():
        prefix = f"{name}."
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        kept = {key: value for key, value in own.items() if key not in (SCALE, UP, DOWN, GAIN)}
        kept |= trained_weight(layer, own)
        if GAIN in own and bool((on := own[GAIN] > 0).any()):
            kept["branch_up"], kept["branch_down"] = (own[UP] * own[GAIN])[:, on], own[DOWN][on]
            set_in(shell, name, _with_rank(layer, int(on.sum())))
        state |= {prefix + key: value for key, value in kept.items()}
    wanted = shell.state_dict()
    # Zero points may be bytes or views of float32, whatever the empty layer has.
    fits = {
        name: value.to(wanted[name].dtype) if value.is_floating_point() else value for name, value in state.items()
    }
    shell.load_state_dict(fits, assign=True)
    mark_quantized(shell)
    return shell


def _with_rank(layer: ScaleLinear, rank: int) -> QLinear:
    """Return an empty quantised layer like a trained one, with an exact low-rank branch."""
    dtype = next((each.dtype for each in (layer.bias, layer.aux_up) if each is not None), None)
    spec = replace(layer.spec, rank=rank)
    new = QLinear(layer.in_features, layer.out_features, spec, device="meta", dtype=dtype, **parts_of(layer))
    new.bins = layer.bins
    return new.eval()
