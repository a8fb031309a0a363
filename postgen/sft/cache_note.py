"""A note in the cache about the settings that filled it last, to tell why a run encodes anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postgen.errors import UserError
from postgen.files import replacing
from postgen.reading import read_json

_NOTE = "settings.json"


def changed_settings(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that differ from those that filled a cache last; none for a new cache."""
    try:
        before = read_json(folder / _NOTE, "the note of the cache")
    except UserError:  # there is none, or it is damaged: the note explains only
        return []
    if not isinstance(before, dict):
        return []
    return [name for name, value in settings.items() if before.get(name) != json.loads(json.dumps(value))]


def note_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings that have filled a cache."""
    with replacing(folder / _NOTE) as part:
        part.write_text(json.dumps(dict(settings), indent=1), encoding="utf-8")
