"""`init_from`: initial weights from an export, a diffusers folder, or a checkpoint of another run."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from postgen.errors import UserError
from postgen.tensor_files import read_tensors

from .checkpoint import find

_LORAS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""File names of LoRA weights: of diffusers and of peft."""


def initialise(models: Mapping[str, torch.nn.Module], folder: Path) -> None:
    """Load weights, and no other state, from a folder into models.

    `folder` may be:

    - a checkpoint; its averaged weights are used if it has them,
    - the folder of a run; its newest checkpoint is used,
    - a folder with one sub-folder of safetensors files per model name (an export, a diffusers pipeline),
    - for a single model, the folder with its safetensors files.

    If a model has no sub-folder, the sub-folders named like its child modules are used. Every trained parameter must
    be found; other tensors may be absent.

    Args:
        models: models by name.
        folder: the folder.

    Raises:
        UserError: the folder has no weights, names or shapes differ, or weights contain NaN.
    """
    if not folder.is_dir():
        raise UserError(f"init_from: {folder} is not a folder. Give a folder with safetensors weights.")
    newest = find(folder)
    if not newest and any((folder / name).is_file() for name in _LORAS):
        raise UserError(f"init_from: {folder} holds a LoRA and no whole network. Continue from it with lora_path.")
    found = _from_checkpoint(newest[-1] if newest else folder)
    for name, model in models.items():
        tensors = _part(found, name) if found else _from_folder(folder, name, model, alone=len(models) == 1)
        _load(model, tensors, f"init_from: {folder} ({name})")


def _from_checkpoint(folder: Path) -> dict[str, Tensor]:
    if not (folder / "state.json").is_file():
        return {}
    return {**_read(folder / "weights.safetensors"), **_read(folder / "ema.safetensors")}


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _from_folder(folder: Path, name: str, model: torch.nn.Module, *, alone: bool) -> dict[str, Tensor]:
    locations = [folder / name, *([folder] if alone else [])]
    for location in locations:
        if tensors := _in(location):
            return tensors
    parts = {part: _in(folder / part) for part, _ in model.named_children()}
    if any(parts.values()):
        return {f"{part}.{key}": value for part, tensors in parts.items() for key, value in tensors.items()}
    raise UserError(f"init_from: no *.safetensors in {' or '.join(map(str, locations))}.")


def _in(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in _read(file).items()}


def _read(path: Path) -> dict[str, Tensor]:
    return read_tensors(path, f"init_from: {path} cannot be read")


def _load(model: torch.nn.Module, tensors: Mapping[str, Tensor], location: str) -> None:
    own = model.state_dict()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    wrong = [
        *(f"{name} is missing" for name in trained if name not in tensors),
        *(f"{name} is unknown" for name in tensors if name not in own),
        *(
            f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
            for name, value in own.items()
            if name in tensors and tensors[name].shape != value.shape
        ),
        *(f"{name} holds NaN" for name in trained if name in tensors and bool(tensors[name].isnan().any())),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{location} does not fit: {'; '.join(wrong[:3])}{more}.")
    model.load_state_dict(dict(tensors), strict=False)
