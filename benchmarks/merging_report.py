"""Result and tables of `python -m benchmarks.merging`. What is not measured yet stays visible as such."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import docs_tables
from benchmarks.dancegrpo_arms import complete
from benchmarks.dancegrpo_stats import BASE, Bootstrap, column, interval, stacked
from benchmarks.gates import gate, gate_lines, largest, write_result
from benchmarks.merging_hacked import row_of
from benchmarks.merging_lora import FILE
from benchmarks.sft_arms import MERGED, SEEDS
from benchmarks.sft_measure import MERGES
from benchmarks.sft_report import measured_gate, read_runs, spread
from postgen.errors import UserError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "merging_results.md"
MEMORY, MEMORY_GATE = "merge_memory", "merge_peak_over_largest_tensor"
ANNEALED, LAST, BEST = "annealed", "last checkpoint", "best single checkpoint"
GATED = "linear"
Point = Mapping[str, Any]


def points_of(constant: Mapping[str, Any], annealed: Mapping[str, Any]) -> dict[str, Point]:
    """Return the compared points of one seed by their names."""
    points = constant["points"]
    steps = sorted((name for name in points if name.startswith("checkpoint-")), key=_step)
    rights = {name: points[name]["valid"]["right"].count("1") for name in steps}
    best = max(steps, key=lambda name: (rights[name], _step(name)))
    found = {ANNEALED: annealed["points"]["last"], LAST: points[steps[-1]], BEST: points[best]}
    return {**found, **{name: points[name] for name in MERGES if name in points}}


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])


def averages(constant: Mapping[int, Any], annealed: Mapping[int, Any]) -> dict[str, Any]:
    """Return the numbers of each way to end a run, for the seeds that both arms have."""
    seeds = sorted(constant.keys() & annealed.keys())
    by_seed = [points_of(constant[seed], annealed[seed]) for seed in seeds]
    rows: dict[str, Any] = {}
    reference = stacked([points[ANNEALED] for points in by_seed], "new", "right")
    boot = Bootstrap(reference.shape[1])
    for name in by_seed[0] if by_seed else ():
        own = [points[name] for points in by_seed]
        right = stacked(own, "new", "right")
        # One draw of seeds and prompts for both: they share runs up to the fork, and noise.
        draws = boot.of(ANNEALED)(right) / boot.of(ANNEALED)(reference)
        losses = [statistics.fmean(point["clean"]["loss"]) for point in own]
        ratio = float(right.mean() / reference.mean()) if reference.mean() > 0 else float("nan")
        rows[name] = {
            "right": {**interval(float(right.mean()), boot.of(ANNEALED)(right)), "by_seed": right.mean(1).tolist()},
            "ratio": interval(ratio, draws) if ratio == ratio else None,
            "loss": statistics.fmean(losses),
            "loss_by_seed": losses,
            "judge": statistics.fmean(value for point in own for value in column(point, "new", "judge")),
        }
    return {"seeds": seeds, "rows": rows}


def payload(out: Path) -> dict[str, Any]:
    """Return the content of the result file.

    Raises:
        UserError: nothing is measured.
    """
    base, runs = read_runs(out, MERGED)
    found: dict[str, Any] = {"averages": {"seeds": [], "rows": {}}, "hacked": []}
    if base is not None:
        found["settings"], found["machine"] = (
            base["settings"],
            {"device": base["device"], "versions": base["versions"]},
        )
        point = base["points"][BASE]
        found["base"] = {
            "right": statistics.fmean(column(point, "new", "right")),
            "loss": statistics.fmean(point["clean"]["loss"]),
        }
        if len(runs) == len(MERGED):
            found["averages"] = averages(runs["constant"], runs["annealed"])
    if (out / FILE).is_file():
        found["lora"] = json.loads((out / FILE).read_text(encoding="utf-8"))
    for path in sorted((out / "measured").glob("hacked-*.json")):
        if complete(path):
            found["hacked"].append(row_of(json.loads(path.read_text(encoding="utf-8"))))
    if base is None and "lora" not in found and not found["hacked"]:
        raise UserError(f"{out} has no measurements: run 'train', 'hacked' or 'lora' with this --out first")
    found["gates"] = gates_of(found)
    return found


def gates_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the gates; those that are not measured have no value, which misses them."""
    told = found["averages"]
    ratio = told["rows"][GATED]["ratio"] if told["seeds"] == list(SEEDS) else None
    shares = [row["recovered"] for row in found["hacked"] if row["recovered"] is not None]
    return [
        gate("merge_vs_annealed", ratio and ratio["value"], ">=", 0.98),
        gate("lora_merge_error", largest(found.get("lora", {}).get("cases", ()), "error"), "<=", 1e-5),
        gate(MEMORY_GATE, measured_gate(MEMORY, MEMORY_GATE), "<=", 3),
        gate("interpolation_recovers", statistics.fmean(shares) if shares else None, ">=", 0.5),
    ]


def write(out: Path, output: str, *, docs: bool) -> Path:
    """Write the result file, and with `docs` the tables of the page."""
    content = payload(out)
    where = write_result(output, content)
    print(where)
    if docs:
        docs_tables.write(PAGE, docs_tables.of_result(content, TABLES))
    return where


# Tables.


def _averages(result: Mapping[str, Any]) -> Iterable[str]:
    rows = result["averages"]["rows"]
    if not rows:
        yield docs_tables.NOTHING
        return
    yield "| end of the run | right in the new world | relative to annealing | held-out loss |"
    yield "|---|---|---|---|"
    for name, row in rows.items():
        relative = spread(row["ratio"]) if row["ratio"] else "undefined"
        yield f"| {name} | {spread(row['right'])} | {relative} | {row['loss']:.4f} |"


def _loras(result: Mapping[str, Any]) -> Iterable[str]:
    if "lora" not in result:
        yield docs_tables.NOTHING
        return
    yield "| case | error of the exact merge | error of the mean of the factors | energy that the rank holds |"
    yield "|---|---|---|---|"
    for row in result["lora"]["cases"]:
        cells = f"{row['error']:.1e} | {row['factor_average_error']:.3f} | {row['retained']:.4f}"
        yield f"| {row['case']} | {cells} |"


def _equal(result: Mapping[str, Any]) -> Iterable[str]:
    if "lora" not in result:
        yield docs_tables.NOTHING
        return
    yield "| equal LoRAs, weight of each | exact merge | `add_weighted_adapter`, `linear` |"
    yield "|---|---|---|"
    for row in result["lora"]["equal"]:
        count = row["copies"]
        yield f"| {count}, 1/{count} | {row['exact']:.3f} times one of them | {row['peft_linear']:.3f} times |"


def _hacked(result: Mapping[str, Any]) -> Iterable[str]:
    if not result["hacked"]:
        yield docs_tables.NOTHING
        return
    yield "| run | eta | exact score: base, hacked, interpolated | share won back | gain of the trained reward kept |"
    yield "|---|---|---|---|---|"
    for row in result["hacked"]:
        exact = ", ".join(f"{row['exact'][name]:.3f}" for name in ("base", "hacked", "interpolated"))
        back, kept = (
            "none was lost" if row["recovered"] is None else f"{row['recovered']:.2f}",
            "no gain" if row["reward_kept"] is None else f"{row['reward_kept']:.2f}",
        )
        yield f"| {row['run']} | {row['eta']:g} | {exact} | {back} | {kept} |"


TABLES = {
    "merging_averages": _averages,
    "merging_loras": _loras,
    "merging_equal": _equal,
    "merging_hacked": _hacked,
    "merging_gates": gate_lines,
}
