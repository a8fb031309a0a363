"""Checks before a merge: the sources must be weights of one architecture, in one form and from one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from postgen.errors import UserError, shown
from postgen.families.exports import NOTE
from postgen.reading import read_json
from postgen.tensor_files import TensorRow

_FREE = ("_name_or_path", "_diffusers_version", "_commit_hash", "transformers_version", "torch_dtype", "dtype")
"""Entries of configs that may differ between sources."""


def check_rows(rows: Sequence[Mapping[str, TensorRow]], labels: Sequence[str], *, any_dtype: bool = False) -> None:
    """Compare names, shapes and dtypes of the tensors of several sources with those of the first.

    Args:
        rows: tensors of each source.
        labels: name of each source for messages.
        any_dtype: whether floating-point dtypes may differ.

    Raises:
        UserError: they differ; the message names the two sources, and the first tensor of each kind of difference.
    """
    first, said = rows[0], labels[0]
    if not first:
        raise UserError(f"{said} holds no tensors")
    for other, label in zip(rows[1:], labels[1:], strict=True):
        missing = sorted(first.keys() - other.keys())
        extra = sorted(other.keys() - first.keys())
        both = [(name, first[name], other[name]) for name in first if name in other]
        shapes = [each for each in both if each[1].shape != each[2].shape]
        dtypes = [
            each
            for each in both
            if each[1].dtype != each[2].dtype and not (any_dtype and each[1].is_float and each[2].is_float)
        ]
        parts = [
            *([f"{len(missing)} tensors are only in the first, such as {missing[0]}"] if missing else ()),
            *([f"{len(extra)} only in the second, such as {extra[0]}"] if extra else ()),
            *(f"{name} is {list(one.shape)} and {list(two.shape)}" for name, one, two in shapes[:1]),
            *(f"{name} is {one.dtype} and {two.dtype}" for name, one, two in dtypes[:1]),
        ]
        if parts:
            only = " (--dtype merges different dtypes)" if not (missing or extra or shapes) else ""
            raise UserError(f"{said} and {label} do not fit: {'; '.join(parts)}{only}")


def check_no_lora(rows: Mapping[str, TensorRow], label: str) -> None:
    """Refuse the factors of a LoRA inside of a model: the mean of factors is not the mean of their products.

    Raises:
        UserError: the tensors hold such factors.
    """
    if name := next((name for name in rows if ".lora_" in name or ".lokr_" in name or ".loha_" in name), ""):
        raise UserError(
            f"{label} holds LoRA factors, such as {name}: the mean of factors is not the mean of their products. Merge"
            " the LoRA files, or models into which the LoRA is fused"
        )


def check_configs(folders: Sequence[Path], names: Sequence[str]) -> None:
    """Compare configs of the sources with those of the first. Sources without the file are skipped.

    Args:
        folders: folder of each source.
        names: paths of the files in the folders.

    Raises:
        UserError: an entry differs, or a file cannot be read.
    """
    for name in names:
        found = {folder: _entries(folder / name) for folder in folders if (folder / name).is_file()}
        for folder, entries in list(found.items())[1:]:
            before, first = next(iter(found.items()))
            differ = [key for key in {**first, **entries} if first.get(key) != entries.get(key) and key not in _FREE]
            if differ:
                key = differ[0]
                raise UserError(
                    f"{before / name} and {folder / name} differ in {', '.join(differ[:3])} ({key}: "
                    f"{shown(first.get(key))} and {shown(entries.get(key))}): only models of one architecture and one"
                    " base can be merged"
                )


def check_notes(paths: Sequence[Path], notes: Sequence[Mapping[str, Any]]) -> None:
    """Compare the notes of LoRA files about their base. Files without a note are skipped.

    Raises:
        UserError: the notes name different pipelines, networks or sizes of layers.
    """
    noted = [(path, note) for path, note in zip(paths, notes, strict=True) if note]
    for path, note in noted[1:]:
        before, first = noted[0]
        for key in ("pipeline", "network", "outputs"):
            if first.get(key) != note.get(key):
                raise UserError(
                    f"{before} and {path} are LoRAs of other bases: their {key} is {shown(first.get(key))} and"
                    f" {shown(note.get(key))}"
                )


def _entries(path: Path) -> dict[str, Any]:
    content = read_json(path, f"cannot read {path}")
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: expected a JSON object")
    # An index has a list [library, class] per component; the note of an export names the base.
    return content


CONFIGS = ("model_index.json", NOTE, "config.json")
"""Files of a folder that must be equal; of each component also its `config.json`."""
