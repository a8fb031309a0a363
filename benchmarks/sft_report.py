"""Result, contact sheets and tables of `python -m benchmarks.sft`. What is not measured yet stays visible as such."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import docs_tables
from benchmarks.dancegrpo_arms import complete
from benchmarks.dancegrpo_measure import read_file
from benchmarks.dancegrpo_stats import Bootstrap, change, column, interval, ratio, stacked
from benchmarks.gates import RESULTS, gate, gate_lines, read_result, write_result
from benchmarks.sft_arms import ARMS, BASE, GATED, SEEDS, TUNED
from postgen.errors import UserError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "sft_results.md"
SHEETS = ("new", "old")
MEASURES = ("right", "judge", "motion")
CARDS, CARDS_GATE = "small_cards", "sft_wan_1p3b_peak_gb"
Files = Mapping[str, Any]


def read_runs(out: Path, arms: Iterable[str]) -> tuple[dict[str, Any] | None, dict[str, dict[int, Files]]]:
    """Return the file of the base model (None if it is not measured), and the complete files by arm and seed.

    Raises:
        UserError: files were measured with different settings, or in an earlier way.
    """
    place = out / "measured" / f"{BASE}.json"
    if not complete(place):
        return None, {}
    base: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    if "autoencoded" not in base:
        raise UserError(f"{place} was measured in an earlier way: run 'train' with another --out")
    found: dict[str, dict[int, Files]] = {}
    for arm in arms:
        for seed in SEEDS:
            path = out / "measured" / f"{arm}.{seed}.json"
            if complete(path):
                found.setdefault(arm, {})[seed] = read_file(path, base["settings"])
    return base, found


def row_of(arm: str, files: Mapping[int, Files], base: Files) -> dict[str, Any]:
    """Return the numbers of one arm: both worlds, motion, judge and loss, with intervals over seeds and prompts."""
    found: dict[str, Any] = {"what": ARMS[arm].what, "seeds": list(files)}
    tuned, first = [each["points"]["last"] for each in files.values()], [base["points"][BASE]]
    for group in ("new", "old"):
        ours, theirs = ({name: stacked(each, group, name) for name in MEASURES} for each in (tuned, first))
        boot = Bootstrap(ours["right"].shape[1])
        right = ours["right"]
        found[group] = {
            "right": {**interval(float(right.mean()), boot.of(arm)(right)), "by_seed": right.mean(1).tolist()},
            "drop": drop_of(change(arm, right, theirs["right"], boot)),
            "judge": change(arm, ours["judge"], theirs["judge"], boot),
            "motion": ratio(arm, ours["motion"], theirs["motion"], boot),
        }
    losses = [each["clean"]["loss"] for each in tuned]
    found["loss"] = [sum(values) / len(values) for values in losses]
    found["seconds"] = [round(each["training"]["seconds"], 1) for each in files.values()]
    return found


def drop_of(changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return base minus tuned with its interval and the value of each seed, from what `change` returns."""
    gain = changed["change"]
    seeds = [round(changed["before"] - value, 5) for value in changed["by_seed"]]
    return {"value": -gain["value"], "low": -gain["high"], "high": -gain["low"], "by_seed": seeds}


def payload(out: Path) -> dict[str, Any]:
    """Return the content of the result file.

    Raises:
        UserError: nothing is measured.
    """
    base, runs = read_runs(out, TUNED)
    exact = out / "exact.json"
    found: dict[str, Any] = {"rows": {}, "measured": []}
    if base is not None:
        point = base["points"][BASE]
        rights = {name: column(point, name, "right") for name in ("new", "old")}
        found["settings"], found["machine"] = (
            base["settings"],
            {"device": base["device"], "versions": base["versions"]},
        )
        found["base"] = {name: sum(values) / len(values) for name, values in rights.items()}
        found["base"]["loss"] = sum(point["clean"]["loss"]) / len(point["clean"]["loss"])
        exactly, shown = (base[name]["right"] for name in ("exact", "autoencoded"))
        found["exact_right"], found["ceiling"] = (each.count("1") / len(each) for each in (exactly, shown))
        found["rows"] = {arm: row_of(arm, files, base) for arm, files in runs.items()}
        found["measured"] = list(runs)
    if exact.is_file():
        found["exact"] = json.loads(exact.read_text(encoding="utf-8"))
    if base is None and "exact" not in found:
        raise UserError(f"{out} has no measurements: run 'train' or 'exact' with this --out first")
    found["gates"] = gates_of(found)
    return found


def gates_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the gates; those that are not measured have no value, which misses them."""
    row = found["rows"].get(GATED)
    whole = row if row is not None and len(row["seeds"]) == len(SEEDS) else None
    return [
        gate("sft_new_world_right", whole and whole["new"]["right"]["value"], ">=", 0.8),
        gate("sft_old_world_drop", whole and whole["old"]["drop"]["high"], "<=", 0.03),
        gate(CARDS_GATE, measured_gate(CARDS, CARDS_GATE), "<=", 16),
        gate("resume_identical", found["exact"]["resume_identical"] if "exact" in found else None, "==", 1),
    ]


def measured_gate(result: str, name: str) -> float | None:
    """Return the value of a gate of another result file; None if the file or the gate does not exist."""
    if not (RESULTS / f"{result}.json").is_file():
        return None
    return next((row["value"] for row in read_result(result)["gates"] if row["name"] == name), None)


def write(out: Path, output: str, *, docs: bool) -> Path:
    """Write the result file, the contact sheets of seed 0, and with `docs` the tables of the page."""
    content = payload(out)
    where = write_result(output, content)
    print(where)
    for group in SHEETS:
        sheet = out / "measured" / f"{GATED}.0.{group}.png"
        if sheet.is_file():
            print(shutil.copyfile(sheet, where.with_name(f"{where.stem}_{group}.png")))
    if docs:
        docs_tables.write(PAGE, docs_tables.of_result(content, TABLES))
    return where


# Tables.


def spread(found: Mapping[str, Any], digits: int = 3) -> str:
    """Return a number with its interval."""
    return f"{found['value']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def arms() -> Iterable[str]:
    """Yield the lines of a table of all arms."""
    yield "| arm | | clips |"
    yield "|---|---|---|"
    yield from (f"| `{name}` | {arm.what} | {arm.clips} |" for name, arm in ARMS.items())


def _worlds(result: Mapping[str, Any]) -> Iterable[str]:
    yield "| arm | new world right | old world right | drop of the old world | motion, new | motion, old | loss |"
    yield "|---|---|---|---|---|---|---|"
    if "base" in result:
        base = result["base"]
        yield f"| exact clips | {result['exact_right']:.3f} | | | | | |"
        yield f"| exact clips through the autoencoder | {result['ceiling']:.3f} | | | | | |"
        yield f"| base model | {base['new']:.3f} | {base['old']:.3f} | | 1 | 1 | {base['loss']:.4f} |"
    for name, arm in TUNED.items():
        row = result["rows"].get(name)
        if row is None:
            yield f"| {arm.what} | not measured | not measured | not measured | | | |"
            continue
        new, old, loss = row["new"], row["old"], sum(row["loss"]) / len(row["loss"])
        cells = [spread(new["right"]), spread(old["right"]), spread(old["drop"])]
        cells += [f"{each['motion']['value']:.2f}" for each in (new, old)]
        yield f"| {arm.what} | {' | '.join(cells)} | {loss:.4f} |"


TABLES = {"sft_worlds": _worlds, "sft_gates": gate_lines}
