"""Result, contact sheet and tables of `python -m benchmarks.prompt`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks import docs_tables
from benchmarks.embedded_sheets import sheet
from benchmarks.gates import gate, gate_lines, read_result, write_result
from postgen.metrics.bootstrap import bootstrap

PAGE = Path(__file__).resolve().parents[1] / "docs" / "prompt_results.md"
MEASURES = ("score", "right", "count", "colour", "shape", "steady", "judge")
LEAST_MOTION = 1e-4
"""Smallest motion of a clip in a logarithm."""
_ABOVE = 1e-6
"""`prompt_gain` must be above 0; operators of gates are not strict."""
_SHEET, _FRAMES = 8, 3
"""Prompts in the contact sheet, and frames of each clip."""
Rows = Sequence[Mapping[str, Any]]


def compared(rows: Rows) -> dict[str, Any]:
    """Return the means of both arms, the paired differences with their intervals, and the ratio of motion."""
    found: dict[str, Any] = {"prompts": len(rows), "changed": sum(row["text"] != row["prompt"] for row in rows)}
    for name in MEASURES:
        raw, new = ([row[arm][name] for row in rows] for arm in ("raw", "enhanced"))
        gain = bootstrap(torch.tensor(new, dtype=torch.float64) - torch.tensor(raw, dtype=torch.float64), draws=10_000)
        found[name] = {
            "raw": _short(statistics.fmean(raw)),
            "enhanced": _short(statistics.fmean(new)),
            "gain": {key: _short(value) for key, value in asdict(gain).items()},
        }
    logs = [_log(row["enhanced"]["motion"]) - _log(row["raw"]["motion"]) for row in rows]
    found["motion_ratio"] = _short(math.exp(statistics.fmean(logs)))
    return found


def _log(motion: float) -> float:
    return math.log(max(motion, LEAST_MOTION))


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def payload(rows: Rows, hard: Rows, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the result file."""
    short, long = ([row for row in rows if (row["kind"] == "long") == whole] for whole in (False, True))
    kinds = dict.fromkeys(row["kind"] for row in short)
    found = {
        "settings": dict(settings),
        "short": compared(short),
        "forms": {kind: compared([row for row in short if row["kind"] == kind]) for kind in kinds if len(short) > 16},
        "long": compared(long),
        "entities": {
            "prompts": len(rows) + len(hard),
            "hard": len(hard),
            "lost": [row["prompt"] for row in (*rows, *hard) if not row["kept"]],
        },
        "examples": [[row["prompt"], row["text"]] for row in short[:8]],
    }
    everything = [row["kept"] for row in (*rows, *hard)]
    found["gates"] = [
        gate("prompt_gain", found["short"]["score"]["gain"]["low"], ">=", _ABOVE),
        gate("entities_kept", sum(everything) / len(everything), "==", 1),
    ]
    return found


def write(rows: Rows, hard: Rows, settings: Mapping[str, Any], output: str) -> Path:
    """Write the result file and return its path."""
    return write_result(output, payload(rows, hard, settings))


def sheet_of(out: Path, target: Path) -> Path:
    """Draw the first clips of each form: the prompt as it is, and enhanced beside it, from the same noise."""
    clips, said = [], []
    for place in sorted((out / "clips").glob("*.safetensors"))[:_SHEET]:
        with safe_open(place, "pt") as file:
            for arm in ("raw", "enhanced"):
                clips.append(file.get_tensor(arm))
                said.append(f"{arm}: {file.metadata()[arm]}")
    return sheet(clips, said, target, columns=2, shown=_FRAMES)


# Tables.


def _gain(measure: Mapping[str, Any]) -> str:
    gain = measure["gain"]
    return f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


_TOLD = {
    "score": "score",
    "right": "all that the prompt asks is right",
    "count": "right count",
    "colour": "colours",
    "shape": "shapes",
    "steady": "steady",
    "judge": "learned judge",
}


def _measures(found: Mapping[str, Any]) -> Iterable[str]:
    yield "| measure | raw prompt | enhanced | difference, 95 % interval |"
    yield "|---|---|---|---|"
    for name, told in _TOLD.items():
        each = found[name]
        yield f"| {told} | {each['raw']:.3f} | {each['enhanced']:.3f} | {_gain(each)} |"
    yield f"| motion relative to the raw prompt | 1 | {found['motion_ratio']:.2f} | |"


def _forms(result: Mapping[str, Any]) -> Iterable[str]:
    yield "| form | score, raw | score, enhanced | difference, 95 % interval | motion ratio |"
    yield "|---|---|---|---|---|"
    for kind, found in (*result["forms"].items(), ("long prompts", result["long"])):
        each = found["score"]
        cells = f"{each['raw']:.3f} | {each['enhanced']:.3f} | {_gain(each)} | {found['motion_ratio']:.2f}"
        yield f"| {kind} | {cells} |"


def _examples(result: Mapping[str, Any]) -> Iterable[str]:
    yield "| prompt | enhanced |"
    yield "|---|---|"
    yield from (f"| {raw} | {text} |" for raw, text in result["examples"])


TABLES = {
    "prompt_gain": lambda result: _measures(result["short"]),
    "prompt_forms": _forms,
    "prompt_examples": _examples,
    "prompt_gates": gate_lines,
}


def write_page(result: Path) -> None:
    """Write the tables of the page."""
    docs_tables.write(PAGE, docs_tables.of_result(read_result(result), TABLES))
