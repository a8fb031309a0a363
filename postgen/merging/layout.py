"""The files of a merged model: which tensors are in which file, and what is copied from the first source."""

from __future__ import annotations

import filecmp
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from postgen.assets import EMBEDDED, embedded_model
from postgen.errors import UserError
from postgen.families.exports import NOTE
from postgen.reading import read_json
from postgen.training.averages import REPORT as OWN_MERGE
from postgen.video import PICTURES, VIDEOS

from .report import NAME as REPORT
from .sources import OTHER_FORMATS, Source

_REPORTS = (REPORT, OWN_MERGE)
"""Reports about earlier merges, which are not copied."""
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_INDEX = re.compile(r".*\.safetensors\.index(\.[^.]+)?\.json")
"""Name of an index of shards, with the name of a variant such as fp16."""
_LARGEST = 2**28
"""Largest size of an index file in bytes."""


@dataclass(kw_only=True)
class Layout:
    """The files of the output, by paths relative to its folder."""

    shards: dict[str, list[str]]
    """Network -> its files, in the order in which `TensorRow.file` counts them."""

    like: int = 0
    """Number of the source whose tensors are split in this way."""

    copies: dict[str, Path] = field(default_factory=dict)
    """Path of a file -> the file to copy."""

    texts: dict[str, str] = field(default_factory=dict)
    """Path of a file -> its text."""

    fill: dict[str, Path] = field(default_factory=dict)
    """Network -> folder with the tensors that the run did not train, and that its checkpoints lack."""


def layout_of(sources: Sequence[Source], dtype_changes: bool) -> Layout:
    """Return the layout of the merge of sources: that of the first folder, or else that of an export of the run.

    Args:
        sources: the sources, which are not LoRAs.
        dtype_changes: whether the sizes in index files become wrong.

    Raises:
        UserError: the sources differ in weights of other formats.
    """
    folders = [source for source in sources if source.kind == "folder"]
    if folders:
        return _of_folder(sources.index(folders[0]), folders[0], folders, dtype_changes)
    if sources[0].kind == "checkpoint":
        return _of_checkpoint(sources[0])
    return Layout(shards={name: [files.files[0].name] for name, files in sources[0].sets.items()})


def _of_folder(number: int, first: Source, folders: Sequence[Source], dtype_changes: bool) -> Layout:
    root = first.path
    shards = {name: [str(file.relative_to(root)) for file in files.files] for name, files in first.sets.items()}
    merged = {path for paths in shards.values() for path in paths}
    homes = {str(Path(path).parent) for path in merged}
    layout = Layout(shards=shards, like=number)
    for file in sorted(root.rglob("*")):
        place = file.relative_to(root)
        if not file.is_file() or str(place) in merged or _is_of_source(place):
            continue
        if file.suffix in OTHER_FORMATS:
            if str(place.parent) not in homes:  # a copy of the merged weights in another format would not be merged
                _check_equal(place, folders)
                layout.copies[str(place)] = file
        elif dtype_changes and _INDEX.fullmatch(file.name):
            layout.texts[str(place)] = _without_size(file)
        else:
            layout.copies[str(place)] = file
    return layout


def _is_of_source(place: Path) -> bool:
    """Return whether a file is about the first source alone: reports of earlier merges, pictures, hidden files."""
    seen = place.suffix.lower() in (*PICTURES, *VIDEOS)
    return str(place) in _REPORTS or seen or any(part[0] == "." for part in place.parts)


def _check_equal(place: Path, folders: Sequence[Source]) -> None:
    """Refuse weights in other formats that differ between the sources, because they are not merged."""
    first = folders[0].path / place
    for other in folders[1:]:
        file = other.path / place
        if not file.is_file() or not filecmp.cmp(first, file, shallow=False):
            raise UserError(
                f"{first} and {file} differ, and only safetensors are merged: save both models with safe_serialization"
            )


def _without_size(path: Path) -> str:
    """Return the text of an index without the total size of the tensors, which a new dtype changes."""
    index = read_json(path, f"cannot read {path}", most=_LARGEST)
    if not isinstance(index, dict):
        raise UserError(f"cannot read {path}: expected a JSON object")
    metadata = index.get("metadata")
    if isinstance(metadata, dict):
        metadata.pop("total_size", None)
    return json.dumps(index, indent=2) + "\n"


def _of_checkpoint(source: Source) -> Layout:
    """Return the layout of merged checkpoints: a folder per network, with configs if the run or its model has them."""
    layout = Layout(shards={name: [f"{name}/{_WEIGHTS}"] for name in source.sets})
    export = source.path.parent / "export"
    base = _base_folder(source.settings)
    for name in source.sets:
        for folder in (export, *([base] if base else [])):
            if (folder / name / "config.json").is_file():
                layout.copies[f"{name}/config.json"] = folder / name / "config.json"
                layout.fill[name] = folder / name
                break
    if len(layout.fill) < len(layout.shards):  # a network of the run that is no component of a pipeline
        return layout
    if (export / NOTE).is_file():
        layout.copies[NOTE] = export / NOTE
    elif base and (base / "model_index.json").is_file():
        index = read_json(base / "model_index.json", f"cannot read {base / 'model_index.json'}")
        place = EMBEDDED if base == embedded_model() else str(base.resolve())
        note = {"base": place, "pipeline": index.get("_class_name"), "parts": list(layout.shards)}
        layout.texts[NOTE] = json.dumps(note, indent=1) + "\n"
    return layout


def _base_folder(settings: Mapping[str, Any]) -> Path | None:
    """Return the folder of the model that a run trains; None if it is not a local folder."""
    if "model" not in settings:
        return None
    model = settings["model"]
    if model in (None, EMBEDDED):
        return embedded_model()
    folder = Path(str(model)).expanduser()
    return folder if folder.is_dir() else None
