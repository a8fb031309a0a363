"""Scores, costs and plans as JSON files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from postgen.errors import UserError
from postgen.files import replacing
from postgen.reading import read_json


class Record:
    """A frozen dataclass that is kept in a file."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        values: Any = self
        with replacing(path) as part:
            part.write_text(json.dumps(dataclasses.asdict(values), indent=1) + "\n", encoding="utf-8")


def read_record(kind: Any, path: Path, what: str) -> dict[str, Any]:
    """Return the fields of a record as JSON has them: lists and numbers are still to be made what they were.

    Args:
        kind: the dataclass.
        path: of the file.
        what: it holds, for the error.

    Raises:
        UserError: it is something else.
    """
    content = read_json(path, f"{path} cannot be read")
    known = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(content, dict) or content.keys() != known:
        raise UserError(f"{path} holds no {what}: write them with {kind.__name__}.save")
    return content
