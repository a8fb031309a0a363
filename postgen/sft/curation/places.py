"""Files that a curation writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from postgen.errors import UserError


@dataclass(frozen=True, slots=True)
class Places:
    """Files and folders of a curation, beside the JSONL file that it writes."""

    output: Path
    """The rows that are kept."""

    @property
    def store(self) -> Path:
        """The measurements of all files."""
        return self.output.with_name(f"{self.output.stem}.measures.jsonl")

    @property
    def clips(self) -> Path:
        """Folder of the shots and of the pictures without bars."""
        return self.output.with_name(f"{self.output.stem}-clips")

    @property
    def report(self) -> Path:
        """Folder of the report."""
        return self.output.with_name(f"{self.output.stem}-report")


def check_own(places: Places) -> None:
    """Check that existing outputs were written by a curation, so that it replaces no other file.

    Raises:
        UserError: the JSONL file or the folder of the report exists and holds something else.
    """
    if places.output.exists():
        try:
            with open(places.output, encoding="utf-8") as file:
                first = json.loads(file.readline() or "{}")
            own = isinstance(first, dict) and (not first or {"measures", "source"} <= first.keys())
        except (OSError, ValueError):
            own = False
        if not own:
            raise UserError(f"{places.output} exists and was not written by `postgen curate`: give another output")
    if places.report.exists() and not places.report.joinpath("funnel.json").is_file():
        raise UserError(f"{places.report} exists and is not the report of a curation: give another output")
