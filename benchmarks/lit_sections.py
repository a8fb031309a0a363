"""`results/lit.json` has a part for images and one for video, measured apart: each is written without the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gates import RESULTS, Gate, read_result, write_result

_STAMPS = ("date", "device", "versions")


def put_section(name: str, section: Mapping[str, Any], gates: Iterable[Gate] = (), path: str | Path = "lit") -> Path:
    """Write one part of the result; the other parts and their gates stay.

    The stamp of the file is of the last writing: a part says in itself where it was measured.

    Args:
        name: of the part.
        section: its content.
        gates: of this part, in the place of those of the same names.
        path: as for `write_result`.
    """
    target = Path(path) if Path(path).suffix == ".json" else RESULTS / f"{path}.json"
    old = read_result(path) if target.is_file() else {}
    own = list(gates)
    names = {each["name"] for each in own}
    kept = [each for each in old.get("gates", ()) if each["name"] not in names]
    rest = {key: value for key, value in old.items() if key not in (*_STAMPS, "gates", name)}
    return write_result(path, {**rest, name: dict(section), "gates": [*kept, *own]})
