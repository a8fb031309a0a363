"""Reports of the embedded model: gates, comparison of two runs, joined result files, the table for the docs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from benchmarks import autoencoder
from benchmarks.gates import RESULTS, gate
from postgen.errors import UserError

#: By group: the name and the target of the gate on its share of fully right clips.
RIGHT = {
    "one": ("one_body", 0.97),
    "image_one": ("image_to_video_right", 0.9),
    "synonyms": ("synonyms_right", 0.9),
}
#: By group: the name and the target of the gate on its share of fully right clips, divided by that of group "one".
RATIOS = {
    "unseen": ("unseen_ratio", 0.9),
    "frames_17": ("frames_17", 0.8),
    "frames_49": ("frames_49", 0.8),
    "size_96": ("size_96", 0.8),
}
PARTS = ("autoencoder", "seconds_cpu")
"""Parts of a result file that are not groups; each is measured once."""


def right(result: dict[str, Any], name: str, measure: str = "all_right") -> float | None:
    """Return the share of a group for `measure`, or None if the group was not measured."""
    row = result["groups"].get(name)
    return None if row is None else row["shares"].get(measure)


def gates(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all gates of a result. A gate without a measurement has the value None and is not met."""
    rows = [gate(name, right(result, group), ">=", target) for group, (name, target) in RIGHT.items()]
    old, one = right(result, "old_two"), right(result, "one")
    # The gate compares with the previous model, so it has no value without measurements of that model.
    two = None if old is None else right(result, "two")
    rows.append(gate("two_bodies", two, ">=", max(0.6, (old or 0.0) + 0.1)))
    for group, (name, target) in RATIOS.items():
        share = right(result, group)
        rows.append(gate(name, share / one if share is not None and one else None, ">=", target))
    rows.append(gate("camera_right", right(result, "camera", "camera"), ">=", 0.8))
    floors = result["groups"].get("seeds", {}).get("diversity", {}).get("floors")
    rows.append(gate("floor_colours", floors, ">=", 0.8))
    missing = {"psnr_objects": None, "first_frame_gap_db": None, "kept_right": None}
    rows += autoencoder.gates(result.get("autoencoder") or missing)
    rows += [
        gate("seconds_cpu", result.get("seconds_cpu"), "<=", 8.0),
        gate("folder_mb", result.get("folder_mb"), "<=", 24.0),
    ]
    against = result.get("against")
    if against:
        rows.append(gate("groups_apart_from_first_run", len(against["apart"]), "==", 0))
    return rows


def agreement(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Compare the shares of fully right clips of two runs with different prompts and seeds, group by group.

    The intervals of the difference are Newcombe's (Statistics in Medicine 17, 1998, method 10). Their level is
    corrected for the number of groups (Bonferroni): for two equal models, some group lies outside its interval with a
    probability of 5 %. `apart` lists the groups whose interval does not contain 0.

    Raises:
        UserError: if both runs have the same first seed, or no group in common.
    """
    if first["settings"]["first_seed"] == second["settings"]["first_seed"]:
        raise UserError("both runs have the same first_seed: give the second run another --first_seed")
    names = [name for name in second["groups"] if name in first["groups"]]
    if not names:
        raise UserError("the two runs have no group in common: measure at least one group of the first run")
    z = NormalDist().inv_cdf(1 - 0.05 / (2 * len(names)))
    table, apart = {}, []
    for name in names:
        a, b = (run["groups"][name]["right"] for run in (first, second))
        low, high = difference(a.count("1"), len(a), b.count("1"), len(b), z)
        table[name] = {"first": a.count("1") / len(a), "second": b.count("1") / len(b), "interval": [low, high]}
        if not low <= 0 <= high:
            apart.append(name)
    return {"first_seed": first["settings"]["first_seed"], "date": first["date"], "groups": table, "apart": apart}


def difference(right_a: int, of_a: int, right_b: int, of_b: int, z: float) -> tuple[float, float]:
    """Return Newcombe's interval of the second share minus the first.

    Args:
        right_a: number of right clips of the first run.
        of_a: number of clips of the first run.
        right_b: number of right clips of the second run.
        of_b: number of clips of the second run.
        z: quantile of the normal distribution for the level, for example 1.96 for 95 %.
    """
    (low_a, p_a, high_a), (low_b, p_b, high_b) = _wilson(right_a, of_a, z), _wilson(right_b, of_b, z)
    gap = p_b - p_a
    return gap - math.hypot(p_b - low_b, high_a - p_a), gap + math.hypot(high_b - p_b, p_a - low_a)


def _wilson(hits: int, n: int, z: float) -> tuple[float, float, float]:
    """Return the lower end of Wilson's score interval, the share itself, and the upper end."""
    p = hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return min(low, p), p, max(high, p)


def stored(name: str | Path) -> dict[str, Any]:
    """Read a result file, given its name or path.

    Raises:
        UserError: if the file does not exist, or has no groups because an earlier version of the benchmark wrote it.
    """
    path = Path(name) if Path(name).suffix == ".json" else RESULTS / f"{name}.json"
    if not path.is_file():
        raise UserError(f"result file {path} does not exist: give the name or path of an existing one")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "groups" not in result:
        raise UserError(f"{path} has no groups: give a file written by this version of benchmarks.embedded_model")
    return result


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join results of the same model and the same settings that measured different groups.

    Raises:
        UserError: if the settings differ, or if two results have the same group or part.
    """
    whole: dict[str, Any] = {"settings": results[0]["settings"], "groups": {}}
    for result in results:
        if result["settings"] != whole["settings"]:
            raise UserError(
                f"cannot join runs with different settings: {whole['settings']}, {result['settings']}. Give files with"
                " equal settings"
            )
        if twice := sorted(whole["groups"].keys() & result["groups"].keys()):
            raise UserError(f"two of the files have {', '.join(twice)}: give files with different groups")
        whole["groups"] |= result["groups"]
        whole["devices"] = whole.get("devices", {}) | result.get("devices", {})
        for part in (*PARTS, "folder_mb"):
            if result.get(part) is None:
                continue
            if part != "folder_mb" and whole.get(part) is not None:
                raise UserError(f"two of the files have {part}: give only one file with this part")
            whole[part] = result[part]
    return whole


def by_guidance(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join results of one model at several guidance scales. The joined result has no gates.

    Raises:
        UserError: if two results have the same guidance scale, or differ in another setting.
    """
    runs: dict[str, Any] = {}
    for result in results:
        rest = {name: value for name, value in result["settings"].items() if name != "guidance_scale"}
        name = f"guidance {result['settings']['guidance_scale']:g}"
        first = next(iter(runs.values()), result)["settings"]
        if name in runs or any(first[key] != value for key, value in rest.items()):
            raise UserError(
                f"cannot join {result['settings']} and {first}: the guidance scales must differ, all other settings"
                " must be equal"
            )
        runs[name] = {"settings": result["settings"], "groups": result["groups"]}
    return {"runs": runs, "gates": []}


COLUMNS = ("count", "colour", "shape", "direction", "event", "all_right")


def markdown(result: dict[str, Any], shifted: dict[str, Any] | None = None) -> str:
    """Return the groups as a Markdown table for the documentation.

    `shifted` is the result of a run with other prompts and seeds; it adds the last column.
    """
    heads = ["prompts", "px, frames", *(name.replace("_", " ") for name in COLUMNS), "its 95 % interval"]
    heads += ["shifted run"] if shifted else []
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, row in result["groups"].items():
        cells = [_number(row["shares"].get(column)) for column in COLUMNS]
        low, high = row["intervals"].get("all_right", (None, None))
        cells = [name, f"{row['size']}, {row['frames']}", *cells, f"{_number(low)} to {_number(high)}"]
        if shifted:
            cells.append(_number(right(shifted, name)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}".removeprefix("0") if value < 1 else "1"
