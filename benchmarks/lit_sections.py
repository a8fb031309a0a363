"""Write one part of `results/lit.json`, which has separately measured parts for images and for video."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gates import RESULTS, Gate, read_result, write_result

_STAMPS = ("date", "device", "versions")


def section_before(name: str, path: str | Path = "lit") -> Mapping[str, Any]:
    """Return one part of the existing result; an empty mapping if the result or the part does not exist."""
    found: Mapping[str, Any] = (read_result(path) if _target(path).is_file() else {}).get(name, {})
    return found


def put_section(
    name: str,
    section: Mapping[str, Any],
    gates: Iterable[Gate] = (),
    path: str | Path = "lit",
    owned: Collection[str] = (),
) -> Path:
    """Write one part of the result. The other parts and their gates stay.

    Date, device and versions of the file are those of the last writing, so each part also contains where it was
    measured.

    Args:
        name: name of the part.
        section: content of the part.
        gates: gates of the part; they replace gates of the same names.
        path: see `write_result`.
        owned: names of all gates that the part can have. Gates of an earlier report that are no longer among `gates`
            are removed.
    """
    old = read_result(path) if _target(path).is_file() else {}
    own = list(gates)
    names = {*owned, *(each["name"] for each in own)}
    kept = [each for each in old.get("gates", ()) if each["name"] not in names]
    rest = {key: value for key, value in old.items() if key not in (*_STAMPS, "gates", name)}
    return write_result(path, {**rest, name: dict(section), "gates": [*kept, *own]})


def _target(path: str | Path) -> Path:
    return Path(path) if Path(path).suffix == ".json" else RESULTS / f"{path}.json"
