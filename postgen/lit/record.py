"""JSON files of scores, costs and plans."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from postgen.errors import UserError
from postgen.files import replacing
from postgen.reading import read_json


class Record:
    """Base class of frozen dataclasses that are saved to JSON files."""

    def save(self, path: Path) -> None:
        """Write the record to a JSON file; an existing file is replaced."""
        values: Any = self
        with replacing(path) as part:
            part.write_text(json.dumps(dataclasses.asdict(values), indent=1) + "\n", encoding="utf-8")


def read_record(kind: Any, path: Path, what: str) -> dict[str, Any]:
    """Read the fields of a record as plain JSON values; the caller converts them to the types of the dataclass.

    Args:
        kind: the dataclass.
        path: the file.
        what: the name of the content for error messages, such as "plan".

    Raises:
        UserError: the file cannot be read, or its fields are not those of the dataclass.
    """
    content = read_json(path, f"{path} cannot be read")
    known = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(content, dict) or content.keys() != known:
        raise UserError(f"{path} holds no {what}: give a file that {kind.__name__}.save wrote")
    return content
