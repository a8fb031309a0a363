"""The export of a run in which all weights of some networks were trained: these, and the name of the model around.

A text encoder may be ten times as large as what was trained, so an export is no whole pipeline: a note says of which
model the rest is, and `inspect_model` and `load_pipeline` take the folder as a model.
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
"""Name of the note in an export. It calls the embedded model `EMBEDDED`: that lies elsewhere on every machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What a note says."""

    base: str
    """Folder or hub id of the model around it."""
    parts: tuple[str, ...]
    """Components that the export holds, each in a folder of its name."""


def write_note(folder: Path, pipe: Any, parts: Sequence[str]) -> None:
    """Say in an export to which model it belongs; of a pipeline that was made in Python there is nothing to say.

    Args:
        folder: the export.
        pipe: the pipeline that was trained.
        parts: the components of it that the export holds.
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
    """Return what the note of an export says; None where there is none.

    Raises:
        UserError: it cannot be read, or names parts that are not there.
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
            raise UserError(f"{path} says that there is {name}/, and there is none: is the export complete?")
    return Export(base=str(embedded_model()) if base == EMBEDDED else base, parts=tuple(parts))


def hint(folder: Path, model: str) -> str:
    """Return what to do with a folder that is no model, to be put behind the message."""
    if any((place / "pytorch_lora_weights.safetensors").is_file() for place in (folder, folder / "export")):
        return (
            f"; it holds a LoRA: use --lora {model} (lora_path in a recipe), with the model that it was trained on as"
            " --model"
        )
    if read_note(folder / "export") is not None or (folder / "export" / "model_index.json").is_file():
        return f"; it is the folder of a run: use {Path(model) / 'export'}"
    if any(folder.glob("transformer*/config.json")):
        return (
            f"; it holds a network alone: write {folder / NOTE} with "
            '{"base": "FOLDER or owner/name of its model", "parts": ["transformer"]}'
        )
    if (folder / "config.json").is_file():
        return "; it is one network of a pipeline: give the folder that `pipe.save_pretrained` writes"
    return ""
