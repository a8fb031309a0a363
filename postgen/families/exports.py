"""The export of a run that trained all weights of some networks: the trained networks and the name of the base model.

An export is not a whole pipeline, because a text encoder may be ten times as large as the trained network. A note in
the export names the base model, from which the other components come. `inspect_model` and `load_pipeline` accept the
folder of an export as a model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgen.assets import EMBEDDED, embedded_model
from postgen.errors import UserError, shown
from postgen.files import replacing
from postgen.reading import read_json

NOTE = "base.json"
"""File name of the note. It calls the embedded model `EMBEDDED`, because its path differs between machines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """The content of a note."""

    base: str
    """Folder or Hub id of the base model."""
    parts: tuple[str, ...]
    """Names of the components in the export; each one is in a folder of this name."""


def write_note(folder: Path, pipe: Any, parts: Sequence[str]) -> None:
    """Write a note into an export that names the base model.

    A pipeline that was built in Python, not loaded, has no name; then this function writes nothing.

    Args:
        folder: folder of the export.
        pipe: the trained pipeline.
        parts: names of its components in the export.
    """
    base = str(getattr(pipe, "name_or_path", None) or "")
    if not base:
        return
    local = Path(base)
    if local.is_dir():
        base = EMBEDDED if local.resolve() == embedded_model() else str(local.resolve())
    note = {"base": base, "pipeline": type(pipe).__name__, "parts": list(parts)}
    with replacing(folder / NOTE) as part:
        part.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def read_note(folder: Path) -> Export | None:
    """Return the content of the note of an export; None if the folder has no note.

    Raises:
        UserError: the note cannot be read or is not valid, or it names components that the export does not have.
    """
    path = folder / NOTE
    if not path.is_file():
        return None
    note = read_json(path, f"cannot read {path}")
    base, parts = (note.get("base"), note.get("parts")) if isinstance(note, dict) else (None, None)
    if not (isinstance(base, str) and base and isinstance(parts, list) and parts and set(map(type, parts)) == {str}):
        raise UserError(
            f"{path} must have a base (a folder or owner/name) and a list of parts, got {shown(base)}, {shown(parts)}"
        )
    for name in parts:
        if not name.isidentifier():
            raise UserError(f"{path}: the parts must be names of components, got {shown(name)}")
        if not (folder / name / "config.json").is_file():
            raise UserError(
                f"{path} names the component {name}, but {name}/config.json is missing: copy the whole export"
            )
    return Export(base=str(embedded_model()) if base == EMBEDDED else base, parts=tuple(parts))


def hint(folder: Path, model: str) -> str:
    """Return advice for a folder that is not a model, to append to an error message; empty if there is none."""
    if any((place / "pytorch_lora_weights.safetensors").is_file() for place in (folder, folder / "export")):
        return f"; it holds a LoRA: use --lora {model} (lora_path in a recipe), with its base model as --model"
    if read_note(folder / "export") is not None or (folder / "export" / "model_index.json").is_file():
        return f"; it is the folder of a run: use {Path(model) / 'export'}"
    if any(folder.glob("transformer*/config.json")):
        return (
            f"; it holds only a network: write {folder / NOTE} with "
            '{"base": "FOLDER or owner/name of its model", "parts": ["transformer"]}'
        )
    if (folder / "config.json").is_file():
        return "; it is one network of a pipeline: use the folder that `pipe.save_pretrained` writes"
    return ""
