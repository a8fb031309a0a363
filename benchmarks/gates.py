"""Gates: the targets of measured values. `python -m benchmarks.gates` prints the gates that are missed.

A result file under `benchmarks/results/` is one JSON object with `"gates": [{"name", "value", "op", "target", "ok"}]`.
A missed gate stays in its file. It is an error only with `--strict`.
"""

import argparse
import json
import math
import operator
import platform
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from postgen.files import replacing
from postgen.info import versions

RESULTS = Path(__file__).resolve().parent / "results"
OPERATORS = {">=": operator.ge, "<=": operator.le, "==": operator.eq}

Gate = dict[str, Any]


def gate(name: str, value: float | None, op: str, target: float) -> Gate:
    """Return one gate with the keys of a result file.

    Args:
        name: the name of the gate.
        value: the measured value; None, if it could not be measured, misses the gate.
        op: how `value` must compare to `target`: ">=", "<=" or "==".
        target: the number to reach.

    Raises:
        ValueError: `op` is unknown, or `target` is not finite.

    >>> gate("colour", 0.84, ">=", 0.8)
    {'name': 'colour', 'value': 0.84, 'op': '>=', 'target': 0.8, 'ok': True}
    """
    return {"name": name, "value": value, "op": op, "target": target, "ok": passes(value, op, target)}


def passes(value: float | None, op: str, target: float) -> bool:
    """Return whether a measured value reaches its target; None and NaN never do.

    Raises:
        ValueError: `op` is unknown, or `target` is not finite.
    """
    if op not in OPERATORS:
        raise ValueError(f"the operator of a gate must be one of {', '.join(OPERATORS)}, got {op!r}")
    if not math.isfinite(target):
        raise ValueError(f"the target of a gate must be a finite number, got {target}")
    return value is not None and bool(OPERATORS[op](value, target))


def gate_lines(result: Mapping[str, Any]) -> Iterable[str]:
    """Yield the lines of a Markdown table of the gates of a result."""
    yield "| gate | measured | target | |"
    yield "|---|---|---|---|"
    for row in result["gates"]:
        value = "not measured" if row["value"] is None else f"{row['value']:.4g}"
        yield f"| `{row['name']}` | {value} | {row['op']} {row['target']:g} | {'met' if row['ok'] else 'missed'} |"


def largest(rows: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """Return the largest number of a column; None, which misses every gate, if there are no rows."""
    return max((row[key] for row in rows), default=None)


def smallest(rows: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """Return the smallest number of a column; None, which misses every gate, if there are no rows."""
    return min((row[key] for row in rows), default=None)


def write_result(path: str | Path, payload: dict[str, Any]) -> Path:
    """Write a result file with `date`, `device`, `versions` and `payload`, and return its path.

    An existing file is replaced only when the new file is complete.

    Args:
        path: a name such as "kernels", for `benchmarks/results/kernels.json`, or a path that ends in .json.
        payload: JSON values; the function `gate` creates its `gates`. NaN and infinity are refused, because JSON has
            neither.

    Raises:
        ValueError: the payload has one of the keys that this function sets, or holds NaN or infinity.
    """
    stamp = _stamp()
    clash = sorted(stamp.keys() & payload.keys())
    if clash:
        raise ValueError(f"write_result sets {', '.join(clash)} itself: remove it from the payload")
    return _write(_target(path), {**stamp, **payload})


def read_result(path: str | Path) -> dict[str, Any]:
    """Return the content of a result file; `path` is a name or path as in `write_result`."""
    found: dict[str, Any] = json.loads(_target(path).read_text(encoding="utf-8"))
    return found


def amend_result(
    path: str | Path,
    measured: dict[str, Any],
    settings: dict[str, Any],
    gates: list[Gate],
    *,
    stamp: Mapping[str, Any] | None = None,
    parts: Iterable[str] | None = None,
) -> Path:
    """Replace keys of an existing result file that were measured again, and return the path of the file.

    The file gets a stamp for each of them under `remeasured`. The other keys keep their values, and the file keeps its
    date, device and versions.

    Args:
        path: a name or path as in `write_result`.
        measured: the keys and their new values.
        settings: the settings of this measurement, which become part of the stamps.
        gates: the gates of the whole changed result.
        stamp: a mapping with the `date`, `device` and `versions` of the machine that measured; the default is this
            machine and the current time.
        parts: the names for the stamps, if only parts of the keys were measured; the default is the keys.

    Raises:
        ValueError: a key of `measured` is reserved, or a value holds NaN or infinity.
        FileNotFoundError: the file does not exist.
    """
    old, here = read_result(path), _stamp()
    stamp = here if stamp is None else {key: stamp[key] for key in here}
    clash = sorted({*stamp, "gates", "settings", "remeasured"} & measured.keys())
    if clash:
        raise ValueError(f"{', '.join(clash)} cannot be measured: remove it from the payload")
    names = measured if parts is None else parts
    again = {**old.get("remeasured", {}), **{name: {**stamp, "settings": settings} for name in names}}
    return _write(_target(path), {**old, **measured, "remeasured": again, "gates": gates})


def _target(path: str | Path) -> Path:
    return Path(path) if Path(path).suffix == ".json" else RESULTS / f"{path}.json"


def _stamp() -> dict[str, Any]:
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "device": device(), "versions": versions()}


def _write(target: Path, result: dict[str, Any]) -> Path:
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    with replacing(target) as part:
        part.write_text(text, encoding="utf-8")
    return target


def device() -> str:
    """Return a name of the hardware: the GPUs that torch finds, or the architecture and threads of the processor."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(0)}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def recompute(path: Path) -> list[Gate]:
    """Return the gates of a result file with `ok` recomputed from value, operator and target.

    Raises:
        ValueError: the file is not JSON, or a gate lacks a key.
    """
    try:
        gates = json.loads(path.read_text(encoding="utf-8"))["gates"]
        return [gate(row["name"], row["value"], row["op"], row["target"]) for row in gates]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path.name} is not a result file, which needs a list 'gates' of complete rows ({error})"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error


def main(argv: list[str] | None = None) -> int:
    """Print the missed gates; with `--strict`, return 1 if there is one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--strict", action="store_true", help="exit with code 1 if a gate is missed")
    options = parser.parse_args(argv)
    try:
        rows = [(path.stem, row) for path in sorted(options.folder.glob("*.json")) for row in recompute(path)]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    short = [(stem, row) for stem, row in rows if not row["ok"]]
    if short:
        Console().print(_table(short))
    print(f"{len(rows) - len(short)} of {len(rows)} gates are met")
    return int(options.strict and bool(short))


def _table(rows: list[tuple[str, Gate]]) -> Table:
    table = Table(title="missed gates")
    for heading in ("result", "gate", "measured", "target"):
        table.add_column(heading)
    for stem, row in rows:
        measured = "not measured" if row["value"] is None else f"{row['value']:.6g}"
        table.add_row(stem, row["name"], measured, f"{row['op']} {row['target']:g}")
    return table


if __name__ == "__main__":
    sys.exit(main())
