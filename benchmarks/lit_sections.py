"""Write one part of `results/lit.json`, which has separately measured parts for images and for video."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gates import RESULTS, Gate, read_result, write_result

_STAMPS = ("date", "device", "versions")


def put_section(name: str, section: Mapping[str, Any], gates: Iterable[Gate] = (), path: str | Path = "lit") -> Path:
    """Write one part of the result. The other parts and their gates stay.

    Date, device and versions of the file are those of the last writing, so each part also contains where it was
    measured.

    Args:
        name: name of the part.
        section: content of the part.
        gates: gates of the part; they replace gates of the same names.
        path: see `write_result`.
    """
    target = Path(path) if Path(path).suffix == ".json" else RESULTS / f"{path}.json"
    old = read_result(path) if target.is_file() else {}
    own = list(gates)
    names = {each["name"] for each in own}
    kept = [each for each in old.get("gates", ()) if each["name"] not in names]
    rest = {key: value for key, value in old.items() if key not in (*_STAMPS, "gates", name)}
    return write_result(path, {**rest, name: dict(section), "gates": [*kept, *own]})
