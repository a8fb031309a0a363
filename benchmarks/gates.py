"""Gates: the numbers a result must reach. `python -m benchmarks.gates` shows every one that falls short.

A result file under `benchmarks/results/` is one JSON object with `"gates": [{"name", "value", "op", "target", "ok"}]`.
A gate that is missed stays in its file and is printed here; it is not an error unless `--strict` asks for that.
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
    """Return one gate as it stands in a result file.

    Args:
        name: the name its issue gives it.
        value: what was measured; None when it could not be, which misses the gate.
        op: how `value` must compare with `target`: ">=", "<=" or "==".
        target: the number asked for.

    Raises:
        ValueError: another `op`, or a target that is no finite number.

    >>> gate("colour", 0.84, ">=", 0.8)
    {'name': 'colour', 'value': 0.84, 'op': '>=', 'target': 0.8, 'ok': True}
    """
    return {"name": name, "value": value, "op": op, "target": target, "ok": passes(value, op, target)}


def passes(value: float | None, op: str, target: float) -> bool:
    """Compare a measurement with its target; a missing or NaN measurement passes nothing.

    Raises:
        ValueError: an unknown `op`, or a target that is no finite number.
    """
    if op not in OPERATORS:
        raise ValueError(f"unknown gate operator {op!r}: known are {', '.join(OPERATORS)}")
    if not math.isfinite(target):
        raise ValueError(f"a gate's target must be a finite number, got {target}")
    return value is not None and bool(OPERATORS[op](value, target))


def largest(rows: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """Return the largest number of a column; None, which passes no gate, without rows."""
    return max((row[key] for row in rows), default=None)


def smallest(rows: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """Return the smallest number of a column; None, which passes no gate, without rows."""
    return min((row[key] for row in rows), default=None)


def write_result(path: str | Path, payload: dict[str, Any]) -> Path:
    """Write `payload` after `date`, `device` and `versions`; an old file goes only when the new one is complete.

    Args:
        path: a name such as "kernels" (goes to `benchmarks/results/kernels.json`) or a path that ends in .json.
        payload: JSON values; its `gates` come from `gate`. NaN and infinity are refused: JSON has neither.

    Raises:
        ValueError: a payload that sets a stamped key, or holds NaN.
    """
    stamp = _stamp()
    clash = sorted(stamp.keys() & payload.keys())
    if clash:
        raise ValueError(f"write_result sets {', '.join(clash)} itself: leave it out of the payload")
    return _write(_target(path), {**stamp, **payload})


def read_result(path: str | Path) -> dict[str, Any]:
    """Return a result file as it stands, by the name or path that `write_result` takes."""
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
    """Put keys of a result that were measured again into its file, each with a stamp of its own under `remeasured`.

    The other keys keep their values, and with them the file's own date, device and versions.

    Args:
        path: of an existing result, as for `write_result`.
        measured: the keys and their new values.
        settings: of this measurement; they stand in the stamps.
        gates: of the whole result as it is now.
        stamp: `date`, `device` and `versions`, as a result has them, of another machine that measured; those of here
            and now by default.
        parts: names of what was measured in these keys, where they hold more; the stamps are theirs then.

    Raises:
        ValueError: a key that the file does not get by measuring, or a value with NaN.
        FileNotFoundError: there is no such file yet.
    """
    old, here = read_result(path), _stamp()
    stamp = here if stamp is None else {key: stamp[key] for key in here}
    clash = sorted({*stamp, "gates", "settings", "remeasured"} & measured.keys())
    if clash:
        raise ValueError(f"{', '.join(clash)} cannot be measured: leave it out of the payload")
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
    """Name the hardware: the accelerator that torch sees, else the processor's architecture and its cores in use."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(0)}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def recompute(path: Path) -> list[Gate]:
    """Return the gates of a result file with `ok` computed from value, operator and target, whatever the file says.

    Raises:
        ValueError: the file is not JSON, or a gate lacks a part.
    """
    try:
        gates = json.loads(path.read_text(encoding="utf-8"))["gates"]
        return [gate(row["name"], row["value"], row["op"], row["target"]) for row in gates]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path.name} is no result file: a list 'gates' of complete rows is needed ({error})"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error


def main(argv: list[str] | None = None) -> int:
    """Print the gates that fall short; with `--strict`, exit 1 when there is one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=RESULTS, help="where the result files are")
    parser.add_argument("--strict", action="store_true", help="exit with code 1 when a gate falls short")
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
    table = Table(title="gates that fall short")
    for heading in ("result", "gate", "measured", "asked for"):
        table.add_column(heading)
    for stem, row in rows:
        measured = "not measured" if row["value"] is None else f"{row['value']:.6g}"
        table.add_row(stem, row["name"], measured, f"{row['op']} {row['target']:g}")
    return table


if __name__ == "__main__":
    sys.exit(main())
