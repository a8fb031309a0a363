"""Interpolation of an export with its base model: theta = base + amount (tuned - base).

An amount below 1 takes back a part of what training changed, wanted or not. For a LoRA, `--lora FOLDER:0.5` of
`postgen generate` has the same effect; here the result is a folder that `lora_path` and `evaluate_only` accept too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from postgen.errors import UserError, check_number
from postgen.families.exports import read_note, write_note
from postgen.families.loading import inspect_model, load_pipeline
from postgen.files import replacing
from postgen.tensor_files import opened, read_tensors

_LORA = "pytorch_lora_weights.safetensors"


def interpolate_export(export: str | Path, output: str | Path, amount: float) -> Path:
    """Write the interpolation of an export and its base model as another export.

    Args:
        export: the folder `export` of a run, with a LoRA or with whole networks.
        output: the folder to write; another export there is replaced when the new one is complete.
        amount: 0 is the base model and 1 the export, both bit by bit; values outside [0, 1] extrapolate.

    Returns:
        `output`.

    Raises:
        UserError: the folder is not an export, its base model cannot be loaded or has other networks, it holds
            adapters that are not linear in their weights, such as DoRA, or `output` holds something else than an
            export, or lies inside `export`.
    """
    source, target = Path(export), Path(output)
    check_number("amount", amount, -100, 100)
    if source.resolve() == target.resolve():
        raise UserError(f"output is the export itself, {target}: choose another folder")
    if source.resolve() in target.resolve().parents:
        raise UserError(f"output {target} lies inside the export: choose another folder")
    if target.exists() and not (_loras(target) or (target.is_dir() and read_note(target))):
        raise UserError(f"output {target} exists and is not an export: choose another folder")
    loras = _loras(source)
    if not loras and (source / "export").is_dir():
        raise UserError(f"{source} is the folder of a run: give its export, {source / 'export'}")
    with replacing(target) as part:
        if loras:
            shutil.copytree(source, part)
            for file in loras:
                _scale_lora(file, part / file.relative_to(source), amount)
        else:
            part.mkdir()
            _mix_networks(source, part, amount)
    return target


def _loras(export: Path) -> list[Path]:
    """Return the LoRA files of an export: one, or one in the folder of each expert."""
    return sorted(file for place in ("", "transformer*/") for file in export.glob(place + _LORA))


def _scale_lora(file: Path, target: Path, amount: float) -> None:
    """Scale the second matrices of a LoRA; its change of the weights is a product that contains each of them once."""
    from safetensors.torch import save_file

    tensors = read_tensors(file)
    if other := [name for name in tensors if ".lora_A." not in name and ".lora_B." not in name]:
        raise UserError(f"{file} holds {other[0]}, which is not a matrix of a plain LoRA: it cannot be interpolated")
    with opened(file) as content:
        metadata = content.metadata()
    scaled = {name: value * amount if ".lora_B." in name else value for name, value in tensors.items()}
    save_file(scaled, target, metadata=metadata)


def _mix_networks(source: Path, target: Path, amount: float) -> None:
    note = read_note(source)
    if note is None:
        raise UserError(f"{source} is not the export of a run: it holds neither {_LORA} nor base.json")
    tuned, base = (
        load_pipeline(inspect_model(place, images=True), dtype="float32", device="cpu")
        for place in (source, note.base)
    )
    for name in note.parts:
        network, before = getattr(tuned, name), getattr(base, name)
        _mix(network, before.state_dict(), amount, f"{source} and its base model {note.base}: {name}")
        network.save_pretrained(target / name)
    write_note(target, base, note.parts)


@torch.no_grad()
def _mix(network: nn.Module, before: dict[str, Tensor], amount: float, where: str) -> None:
    after = network.state_dict()
    shapes = [{name: value.shape for name, value in state.items()} for state in (before, after)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{where} differ in their weights, so they cannot be interpolated")
    for name, value in after.items():
        if value.is_floating_point():
            value.copy_(torch.lerp(before[name], value, amount))
