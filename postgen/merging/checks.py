"""Checks before a merge: the sources must be weights of one architecture, in one form and from one base."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from postgen.assets import EMBEDDED
from postgen.errors import UserError, shown
from postgen.families.exports import NOTE
from postgen.reading import read_json
from postgen.tensor_files import TensorRow

from .methods import ORDERED
from .sources import Source

_FREE = ("transformers_version", "torch_dtype", "dtype")
"""Entries of configs that may differ between sources; so may paths and versions, which begin with an underscore."""
_CLASS = "_class_name"
_FACTORS = (".lora_", ".lokr_", ".loha_", ".hada_", ".aux_up", ".branch_up")
"""Parts of the names of factors of LoRAs, and of branches of quantised layers, in training and in exports."""


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
            floats = not any_dtype and all(one.is_float and two.is_float for _, one, two in dtypes)
            only = " (--dtype merges different dtypes)" if floats and not (missing or extra or shapes) else ""
            raise UserError(f"{said} and {label} do not fit: {'; '.join(parts)}{only}")


def check_no_lora(rows: Mapping[str, TensorRow], label: str) -> None:
    """Refuse the factors of a LoRA or branch inside of a model: their mean is not the mean of their products.

    Raises:
        UserError: the tensors hold such factors.
    """
    if name := next((name for name in rows if any(part in name for part in _FACTORS)), ""):
        raise UserError(
            f"{label} holds factors of a LoRA or of a branch, such as {name}: the mean of factors is not the mean of"
            " their products. Merge the LoRA files, or models into which the LoRA or branch is fused"
        )


def check_configs(groups: Sequence[Sequence[Path]]) -> None:
    """Compare configs that must be equal. Files that do not exist are skipped.

    Args:
        groups: lists of files; those of one list must be equal, apart from paths and versions.

    Raises:
        UserError: an entry differs, or a file cannot be read.
    """
    for group in groups:
        found = [(path, _entries(path)) for path in group if path.is_file()]
        for path, entries in found[1:]:
            before, first = found[0]
            differ = [key for key in {**first, **entries} if first.get(key) != entries.get(key) and not _is_free(key)]
            if differ:
                key = differ[0]
                raise UserError(
                    f"{before} and {path} differ in {', '.join(differ[:3])} ({key}: {shown(first.get(key))} and"
                    f" {shown(entries.get(key))}): only models of one architecture and one base can be merged"
                )


def check_models(sources: Sequence[Source]) -> None:
    """Compare the models that runs began from, for checkpoints.

    Raises:
        UserError: they differ.
    """
    runs = [source for source in sources if "model" in source.settings]
    for source in runs[1:]:
        one, two = (_name(each.settings["model"]) for each in (runs[0], source))
        if one != two:
            raise UserError(
                f"{runs[0].label} and {source.label} were trained from other bases: {shown(one)} and {shown(two)}"
            )


def check_order(sources: Sequence[Source], method: str) -> None:
    """Check that checkpoints of one run are in the order of their steps, for methods that depend on it.

    Raises:
        UserError: they are not.
    """
    if method not in ORDERED:
        return
    for early, late in itertools.pairwise(sources):
        same = early.path.resolve().parent == late.path.resolve().parent
        if same and early.step is not None and late.step is not None and early.step >= late.step:
            raise UserError(
                f"method {method} needs the checkpoints in the order of their steps: {early.label} is before"
                f" {late.label}; give the older one first"
            )


def _is_free(key: str) -> bool:
    return key in _FREE or (key.startswith("_") and key != _CLASS)


def _entries(path: Path) -> dict[str, Any]:
    content = read_json(path, f"cannot read {path}")
    if not isinstance(content, dict):
        raise UserError(f"cannot read {path}: expected a JSON object")
    if path.name == NOTE:
        content["base"] = _name(content.get("base"))
    return content


def _name(model: object) -> str:
    """Return the last part of the path of a model, because one model may be in several places."""
    return EMBEDDED if model is None else Path(str(model)).name
