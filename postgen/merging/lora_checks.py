"""Checks before LoRA files are merged: arguments, base models, layers, shapes, ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from postgen.errors import UserError, check_number, did_you_mean, is_number, shown
from postgen.families.lora_file import LoraFile
from postgen.families.lora_layers import Layer, shortened

Layers = Mapping[tuple[str, str], Layer]
"""(component, layer name) -> the change of the layer."""


def check_arguments(
    count: int, weights: Sequence[float], rank: int | None, method: str, density: float, known: Collection[str]
) -> None:
    """Check the arguments of `merge_loras` without reading a file.

    Args:
        count: number of files.
        weights: weight of each file.
        rank: largest rank of the result, or None.
        method: the method.
        density: share of the values that a method keeps.
        known: names of the methods.

    Raises:
        UserError: an argument is wrong.
    """
    if count < 1:
        raise UserError("there is no LoRA to merge: give at least one file")
    if len(weights) != count:
        raise UserError(f"{count} LoRA files need {count} weights, got {len(weights)}")
    if wrong := [weight for weight in weights if not is_number(weight)]:
        raise UserError(f"the weights of LoRA files must be numbers, got {shown(wrong[0])}")
    if method not in known:
        near = did_you_mean(method, known) if isinstance(method, str) else ""
        raise UserError(f"unknown method {shown(method)} to merge LoRA files. Known: {', '.join(known)}.{near}")
    if rank is not None:
        check_number("rank", rank, 1, 65536, whole=True)
    if not is_number(density) or not 0 < density <= 1:
        raise UserError(f"density must be above 0 and at most 1, got {shown(density)}")


def check_alike(files: Sequence[LoraFile], sources: Sequence[Layers], rank: int | None) -> None:
    """Check that LoRA files change the same layers of the same model.

    Args:
        files: the files.
        sources: the layers of each file.
        rank: largest rank of the result; None refuses files of different ranks.

    Raises:
        UserError: base models, layers or shapes differ, or ranks do without `rank`; the message names the first case.
    """
    for file, layers in zip(files[1:], sources[1:], strict=True):
        pair = f"{files[0].path} and {file.path} cannot be merged"
        for what, one, other in _bases(files[0], file):
            raise UserError(f"{pair}: they are for different base models ({what} {shown(one)} and {shown(other)})")
        if alone := sorted(sources[0].keys() ^ layers.keys()):
            owner = next(
                each.path for each, own in zip((files[0], file), (sources[0], layers), strict=True) if alone[0] in own
            )
            names = [".".join(name) for name in alone]
            raise UserError(f"{pair}: only one of the two changes these layers: {shortened(names)} (in {owner})")
        for name, layer in layers.items():
            first, where = sources[0][name], ".".join(name)
            if _shape(first) != _shape(layer):
                raise UserError(f"{pair}: {where} has the shapes {_shape(first)} and {_shape(layer)}")
            if (first.bias is None) != (layer.bias is None):
                raise UserError(f"{pair}: only one of the two changes the bias of {where}")
            if rank is None and first.rank != layer.rank:
                raise UserError(
                    f"{pair} without a rank: {where} has the ranks {first.rank} and {layer.rank}. Choose the rank of"
                    f" the result (--rank {max(first.rank, layer.rank)}, or more to lose less)"
                )


def _bases(one: LoraFile, other: LoraFile) -> list[tuple[str, Any, Any]]:
    """Return (what, value, value) of everything that both files say about their base model and that differs."""
    # Folders of the same model may be in several places.
    models = [_name(each.settings.get("base_model_name_or_path")) for each in (one, other)]
    said = [(key, one.note.get(key), other.note.get(key)) for key in ("pipeline", "network", "outputs")]
    said.append(("base model", models[0], models[1]))
    return [row for row in said if row[1] and row[2] and row[1] != row[2]]


def _name(place: Any) -> str | None:
    return Path(place).name if isinstance(place, str) else None


def _shape(layer: Layer) -> tuple[int, ...]:
    return (len(layer.up), *layer.down.shape[1:])
