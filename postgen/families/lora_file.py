"""Find and open LoRA files: their tensors, the settings of peft, and the note about the model that they are for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postgen.errors import UserError, is_number, shown, why_no_pattern
from postgen.reading import parse_json, read_json
from postgen.tensor_files import opened, read_tensors

from .lora_layers import shortened

WEIGHTS = "pytorch_lora_weights.safetensors"
NOTE = "lora.json"
"""File name of the note beside a LoRA that postgen wrote. Its keys: `pipeline`, the pipeline class of the base model;
`network`, the network that the LoRA is for, if the pipeline has two; `outputs`, the number of outputs of the model's
layers, see `lora_names.outputs_of`."""
SAID = "postgen"
"""Key under which the metadata of a LoRA file contain the same note, as JSON."""
EXPERTS = ("transformer", "transformer_2")
"""Networks of a pipeline with two experts; the first takes the steps with high noise."""

_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PARTS = r"text_encoder(?:_[23])?|connectors|text_conditioner|transformer_ref"
"""Components other than the network: text encoders, and components that only a few pipelines have (LTX-2, ...)."""
PREFIX = re.compile(rf"^(base_model\.model\.|transformer\.|unet\.|(?:{_PARTS})\.)+")
"""Prefix of the layer name in keys of diffusers and peft."""
_PART = re.compile(rf"({_PARTS})\.|lora_te([12]?)_")
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")
_MOST = 10**6
"""Largest rank or alpha that is accepted; no layer is that wide."""
_LEAST_RANK = {True: 1, False: -_MOST}
CHANGES_MODEL = re.compile(r"pissa.*|olora|corda|loftq|lora_ga")
"""Initialisations of peft that change the weights of the base model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFile:
    """The content of a LoRA file, with the settings and the note from the files beside it."""

    path: Path
    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    """Known arguments of `peft.LoraConfig` for the network; those for another component are a dict under its name."""
    note: dict[str, Any]
    """Content of the note, see `NOTE`; empty if there is none."""

    def parts(self, network: str) -> dict[str, LoraFile]:
        """Split the tensors and settings by component.

        Args:
            network: component name for all keys without the prefix of another component.

        Returns:
            Component name -> the part of this file for the component.
        """
        tensors: dict[str, dict[str, Tensor]] = {network: {}}
        for key, tensor in self.tensors.items():
            match = _PART.match(key)
            name = network if match is None else match[1] or ("text_encoder_2" if match[2] == "2" else "text_encoder")
            tensors.setdefault(name, {})[key] = tensor
        return {
            name: replace(
                self, tensors=own, settings=self.settings if name == network else self.settings.get(name, {})
            )
            for name, own in tensors.items()
        }


def find_loras(path: Path) -> dict[str | None, Path]:
    """Return network name -> LoRA file for a path, a file or a folder.

    Returns:
        One file under the key None if the path does not tell its network, or one file for each expert.

    Raises:
        UserError: there is no LoRA file, or the path is one shard of several, or a whole model.
    """
    if path.is_file():
        if (shard := _SHARD.search(path.name)) is not None and int(shard[1]) > 1:
            raise UserError(f"{path} is one of {int(shard[1])} shards of a LoRA: merge them into one file first")
        return {None: path}
    places = (path, path / "export")
    for found in (folder / name for folder in places for name in (WEIGHTS, _PEFT_WEIGHTS)):
        if found.is_file():
            return {None: found}
    for folder in places:
        experts = {name: folder / name / WEIGHTS for name in EXPERTS}
        present: dict[str | None, Path] = {name: found for name, found in experts.items() if found.is_file()}
        if present:
            return present
        if any(folder.glob("*/config.json")):
            raise UserError(f"{folder} holds a whole model, not a LoRA: use it as the --model of postgen generate")
    others = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if len(others) == 1 or any(map(_SHARD.search, map(str, others))):
        return find_loras(others[0])
    raise UserError(f"there is no LoRA file {path}: give a .safetensors file, or a folder with {WEIGHTS}")


def open_lora(path: Path) -> LoraFile:
    """Read a LoRA file, and the configuration of peft and the note beside it.

    Raises:
        UserError: a file cannot be read, the file contains no LoRA, is quantised or is damaged (NaN, infinity, an
            invalid rank or alpha), or the LoRA was initialised in a way that changes the base model.
    """
    said = f"cannot read the LoRA {path}"
    tensors = read_tensors(path, said)
    with opened(path, said) as content:
        metadata = content.metadata() or {}
    if not any("lora" in name or ".lokr_" in name or name.endswith((".diff", ".diff_b")) for name in tensors):
        raise UserError(f"{path} is not a LoRA: none of its {len(tensors)} tensors has 'lora' in its name")
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(_comparable(tensor)).all()]
    if bad:
        raise UserError(f"the LoRA {path} is damaged: NaN or infinity in {len(bad)} tensors: {shortened(bad)}")
    if whole := [name for name, tensor in tensors.items() if _is_integer(tensor) and not name.endswith("alpha")]:
        raise UserError(f"the LoRA {path} is quantised: integers in {len(whole)} tensors: {shortened(whole)}")
    # The settings of the network, and of every other component in the file.
    settings = _settings(path, metadata, said)
    for own in _each(settings):
        if CHANGES_MODEL.fullmatch(str(own.get("init_lora_weights"))):
            raise UserError(
                f"the LoRA {path} was initialised with {own['init_lora_weights']}, which also changes the weights of"
                " the base model, so it does not fit the original model: let peft convert it to a plain LoRA"
                " (save_pretrained with path_initial_model_for_weight_conversion)"
            )
    for name, value in (pair for each in _each(settings) for pair in _numbers(each)):
        if not is_number(value) or not _LEAST_RANK[name.startswith("r")] <= value <= _MOST:
            raise UserError(f"the LoRA {path} is damaged: {name} is {shown(value)}")
        if name.startswith("r") and value != int(value):
            raise UserError(f"the LoRA {path} is damaged: {name} is {shown(value)}, not a whole number")
    return LoraFile(path=path, tensors=tensors, settings=settings, note=_note(path, metadata))


def _settings(path: Path, metadata: Mapping[str, str], said: str) -> dict[str, Any]:
    """Return the settings of peft, from the metadata of the file or from the `adapter_config.json` beside it."""
    beside = path.parent / _PEFT_CONFIG
    if path.name == _PEFT_WEIGHTS and beside.exists():
        read, flat = read_json(beside, said), False
    else:
        read, flat = parse_json(metadata.get("lora_adapter_metadata", "{}"), f"{said}: its settings"), True
    if not isinstance(read, dict):
        raise UserError(f"{said}: its settings are {shown(read)}, they must be a JSON object")
    if not flat:
        return read
    settings: dict[str, Any] = {}
    for key, value in read.items():
        part = match[1] if (match := _PART.match(key)) else None
        home = settings if part is None else settings.setdefault(part, {})
        home[PREFIX.sub("", key)] = value
    return settings


def _each(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [settings, *(own for key, own in settings.items() if re.fullmatch(_PARTS, key))]


def _numbers(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    numbers = [(name, settings[name]) for name in ("r", "lora_alpha") if name in settings]
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(name) or {}
        numbers += (
            [(f"{name} of {key}", v) for key, v in patterns.items()]
            if isinstance(patterns, dict) and not any(map(why_no_pattern, patterns))
            else [(name, patterns)]
        )
    return numbers


def _note(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    beside = path.parent / NOTE
    if SAID not in metadata and not beside.exists():
        return {}
    said = f"{f'the note of {path}' if SAID in metadata else beside} cannot be read"
    try:
        note = parse_json(metadata[SAID], said) if SAID in metadata else read_json(beside, said)
        return _checked_note(note)
    except TypeError as error:
        raise UserError(f"{said}: TypeError: {error}. Correct or remove it") from error


def _checked_note(note: Any) -> dict[str, Any]:
    if not isinstance(note, dict) or not isinstance(note.get("pipeline"), str):
        raise TypeError(f"it must be an object with the name of a pipeline, got {shown(note)}")
    outputs = note.get("outputs", {})
    if not isinstance(outputs, dict) or not all(isinstance(n, int) for n in outputs.values()):
        raise TypeError(f"its outputs must be an object of numbers, got {shown(outputs)}")
    if not isinstance(note.get("network", ""), str):
        raise TypeError(f"its network must be a text, got {shown(note['network'])}")
    return note


def floating(tensor: Tensor) -> Tensor:
    """Return a tensor in a dtype that supports arithmetic: float32 for integers and 8-bit floats, else unchanged."""
    return tensor.float() if not tensor.is_floating_point() or tensor.itemsize == 1 else tensor


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _comparable(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.itemsize == 1 else tensor
