"""The result file of `python -m benchmarks.dancegrpo` and its gates."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.dancegrpo_arms import ARMS, GROUPS, SEEDS, SHIPPED
from benchmarks.dancegrpo_exact import FILE as EXACT
from benchmarks.dancegrpo_measure import BASE, PROTOCOL, SHARES
from benchmarks.dancegrpo_stats import (
    Bootstrap,
    File,
    change,
    column,
    cost_to,
    fired,
    floor_ratio,
    gap_closed,
    mean_ratio,
    points_of,
    ratio,
    ratios_of,
    read_runs,
    stacked,
    trained_reward,
)
from benchmarks.gates import RESULTS, Gate, gate, largest, read_result, smallest, write_result
from postgen.errors import UserError

SCALE = "scaling"
"""Result of `benchmarks.rl_scale`, which measures several GPUs."""
MARGIN = 0.03
"""Smallest rise of the mean score of 256 clips that is not chance for one seed."""
COSTS = ("forward_equivalents", "transformer_seconds")
JUDGED = ("right", "world", "judge", "visual", "moves", "clip", "quality")
LOGGED = ("motion/", "group_std", "kl", "diversity/")
"""Parts of the names of metrics of the training that the result keeps."""
RATIOS = ("motion_ratio", "sharpness_ratio", "diversity_ratio", "floor_diversity_ratio", "flow_matching_ratio")
"""Ratios that curves have."""
KEPT = 3
"""Arms that the rule of the screening keeps for further seeds."""


class Report:
    """The numbers of all measured arms.

    Args:
        base: file of the base model.
        runs: files by arm and seed.
    """

    def __init__(self, base: File, runs: Mapping[str, Mapping[int, File]]) -> None:
        self.base, self.runs, self.start = base, runs, base["points"][BASE]
        self.boots = {
            group: Bootstrap(len(column(self.start, group, name)))
            for group, name in (("test", "world"), ("many", "diversity"), ("clean", "loss"))
        }

    def arm(self, name: str) -> dict[str, Any]:
        """Return all numbers of an arm."""
        arm, files = ARMS[name], self.runs[name]
        last = points_of(files, self.base, "last")
        row: dict[str, Any] = {
            **{"what": arm.what, "recipe": arm.recipe, "settings": dict(arm.settings), "budget": arm.budget},
            "seeds": list(files),
            "steps": [point["step"] for point in last],
            "chosen_points": [str(file["chosen"]) for file in files.values()],
            "chosen_steps": [point.get("step", 0.0) for point in points_of(files, self.base, "chosen")],
            **{cost: statistics.fmean(point[cost] for point in last) for cost in COSTS},
            "devices": sorted({file["training"]["device"] for file in files.values()}),
            "log": {str(seed): short_log(file["log"]) for seed, file in files.items()},
        }
        for which in ("chosen", "last"):
            row[which] = self.numbers(name, points_of(files, self.base, which))
        row["guided"] = self.guided(name)
        row["curve"] = self.curve(name)
        if arm.reference in self.runs:
            row["against"] = {which: self.against(name, arm.reference, which) for which in ("chosen", "last")}
        return row

    def numbers(self, name: str, points: Sequence[File]) -> dict[str, Any]:
        """Return the numbers of an arm at one checkpoint of each seed, compared with the base model."""

        def pair(group: str, measure: str) -> tuple[Tensor, Tensor]:
            return stacked(points, group, measure), stacked([self.start], group, measure)

        test, many, clean = (self.boots[group] for group in ("test", "many", "clean"))
        found: dict[str, Any] = {measure: change(name, *pair("test", measure), test) for measure in JUDGED}
        found["gap_closed"] = gap_closed(name, *pair("test", "right"), test)
        found["motion_ratio"] = ratio(name, *pair("test", "motion"), test)
        exact = torch.tensor([column(self.base["exact"], "test", "motion")], dtype=torch.float64)
        found["motion_to_exact"] = ratio(name, pair("test", "motion")[0], exact, test, "exact")
        found["speed_ratio"] = mean_ratio(name, *pair("test", "speed"), test)
        found["sharpness_ratio"] = mean_ratio(name, *pair("test", "sharp"), test)
        found["brightness"] = change(name, *pair("test", "bright"), test)
        found["diversity_ratio"] = mean_ratio(name, *pair("many", "diversity"), many)
        found["floor_diversity_ratio"] = floor_ratio(name, *pair("test", "floor"), test)
        found["flow_matching_ratio"] = mean_ratio(name, *pair("clean", "loss"), clean)
        found["prediction_norm_ratio"] = mean_ratio(name, *pair("clean", "norm"), clean)
        return found

    def guided(self, name: str) -> dict[str, Any]:
        """Return the numbers at the guidance scale and steps with which users run the model."""
        points, test = points_of(self.runs[name], self.base, "chosen"), self.boots["test"]

        def pair(measure: str) -> tuple[Tensor, Tensor]:
            return stacked(points, "guided", measure), stacked([self.start], "guided", measure)

        found: dict[str, Any] = {measure: change(name, *pair(measure), test) for measure in JUDGED}
        return found | {"motion_ratio": ratio(name, *pair("motion"), test)}

    def curve(self, name: str) -> list[dict[str, Any]]:
        """Return the numbers at every checkpoint, beginning with the base model."""
        files = self.runs[name]
        names = sorted(set.intersection(*({*file["points"]} for file in files.values())))
        rows = []
        for place in (BASE, *(each for each in names if each.isdigit())):
            points = points_of(files, self.base, place)
            numbers = self.numbers(name, points)
            row: dict[str, Any] = {measure: numbers[measure]["mean"] for measure in ("right", "world", "judge")}
            row |= {measure: _plain(numbers[measure]) for measure in RATIOS}
            row["step"] = statistics.fmean(point.get("step", 0.0) for point in points)
            row |= {cost: statistics.fmean(point.get(cost, 0.0) for point in points) for cost in COSTS}
            rows.append(row)
        return rows

    def against(self, name: str, other: str, which: str) -> dict[str, Any]:
        """Return the paired differences of two arms."""
        ours, theirs = (points_of(self.runs[each], self.base, which) for each in (name, other))
        test = self.boots["test"]
        found = {
            measure: change(name, stacked(ours, "test", measure), stacked(theirs, "test", measure), test, other)[
                "change"
            ]
            for measure in JUDGED
        }
        motion = (stacked(part, "test", "motion") for part in (ours, theirs))
        return {"reference": other, **found, "motion_ratio": ratio(name, *motion, test, other)}

    def hacking(self, name: str) -> dict[str, Any]:
        """Return when rewards part and guards fire, the curve of each seed, and what other weights give back."""
        found: dict[str, Any] = {}
        for seed, file in self.runs[name].items():
            order = [BASE, *sorted(each for each in file["points"] if each.isdigit())]
            extra = [each for each in ("raw", *(f"mix{share:g}" for share in SHARES)) if each in file["points"]]
            found[str(seed)] = {
                "fired": fired(name, file, self.base),
                "series": [self._short(name, file, each) for each in order],
                "back": {each: self._short(name, file, each) for each in (*extra, str(file["last"]))},
            }
        return found

    def _short(self, name: str, file: File, place: str) -> dict[str, float]:
        point = self.start if place == BASE else file["points"][place]
        found = {"step": point.get("step", 0.0), "reward": float(trained_reward(point, name).mean())}
        found |= {measure: statistics.fmean(column(point, "test", measure)) for measure in ("world", "right", "judge")}
        return {key: float(f"{value:.5g}") for key, value in (found | ratios_of(point, self.start)).items()}


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("value", "low", "high")}


def short_log(log: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a training log that the result keeps."""
    means = {name: values for name, values in log["means"].items() if any(part in name for part in LOGGED)}
    return {**log, "means": means}


def costs_of(arms: Mapping[str, Any]) -> dict[str, Any]:
    """Return the costs of each cheap recipe until the best score that both it and the faithful one reach.

    The score is that of the exact judge on the test prompts, mean over seeds, interpolated between checkpoints.
    """
    found: dict[str, Any] = {}
    for name in [each for each in SHIPPED if each != "faithful" and {each, "faithful"} <= arms.keys()]:
        curves = {each: [(row, row["world"]["value"]) for row in arms[each]["curve"]] for each in (name, "faithful")}
        score = min(max(value for _, value in curve) for curve in curves.values())
        if score <= curves[name][0][1] + MARGIN:
            continue
        found[name] = {"score": score}
        for cost in COSTS:
            mine, theirs = (cost_to([(row[cost], value) for row, value in curves[each]], score) for each in curves)
            found[name] |= {cost: mine, f"{cost}_faithful": theirs, f"{cost}_ratio": _divided(mine, theirs)}
        found[name]["run_ratio"] = _divided(*(arms[each]["forward_equivalents"] for each in curves))
    return found


def _divided(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def gates_of(
    arms: Mapping[str, Any], costs: Mapping[str, Any], exact: Mapping[str, Any], scale: Mapping[str, Any]
) -> list[Gate]:
    """Return the gates. A number that is not measured, or not with enough seeds, misses its gate.

    `motion_ratio` and the two diversity ratios are the worst of all shipped recipes and seeds, `heldout_judge_drop` is
    that of the worst recipe, and `heldout_judge_low` the lower end of the interval of its change.

    Args:
        arms: the numbers of the arms.
        costs: the result of `costs_of`.
        exact: the file of `dancegrpo_exact`, empty if it is missing.
        scale: the values of the gates of `scaling.json`, empty if it is missing.
    """
    whole = {name: arms[name] for name in SHIPPED if name in arms and len(arms[name]["seeds"]) >= len(SEEDS)}
    everyone = len(whole) == len(SHIPPED)

    def of(name: str, *keys: str) -> Any:
        found: Any = whole.get(name)
        for key in keys:
            found = None if found is None else found[key]
        return found

    def all_seeds(measure: str) -> list[dict[str, float]]:
        values = [value for arm in whole.values() for value in arm["chosen"][measure]["by_seed"]]
        return [{"value": value} for value in values] if everyone else []

    final = of("faithful", "chosen", "right", "mean", "value")
    gain = _divided(final, of("faithful", "chosen", "right", "before"))
    logs = [*arms["faithful"]["log"].values(), *arms["fast"]["log"].values()] if everyone else []
    errors, ratio_name = [log["onpolicy_ratio_error"] for log in logs], "forward_equivalents_ratio"
    return [
        gate("gap_closed_faithful", of("faithful", "chosen", "gap_closed", "value"), ">=", 0.5),
        gate("gap_closed_fast", of("fast", "chosen", "gap_closed", "value"), ">=", 0.5),
        gate("fast_cost_ratio", costs.get("fast", {}).get("run_ratio"), "<=", 1 / 3),
        gate("gap_closed_nft", of("nft", "chosen", "gap_closed", "value"), ">=", 0.6),
        gate("motion_ratio", smallest(all_seeds("motion_ratio"), "value"), ">=", 0.85),
        gate("motion_ratio", largest(all_seeds("motion_ratio"), "value"), "<=", 1.15),
        gate("diversity_ratio", smallest(all_seeds("diversity_ratio"), "value"), ">=", 0.8),
        gate("floor_diversity_ratio", smallest(all_seeds("floor_diversity_ratio"), "value"), ">=", 0.8),
        *_judge_gates([arm["chosen"]["judge"]["change"] for arm in whole.values()] if everyone else []),
        gate("ddp_2gpu_speedup", scale.get("ddp_2gpu_speedup"), ">=", 1.7),
        gate("two_gpu_max_abs", scale.get("two_gpu_max_abs"), "<=", 1e-4),
        gate("onpolicy_ratio_error", None if not errors or None in errors else max(errors), "<=", 1e-5),
        gate(ratio_name, smallest([row for row in costs.values() if row[ratio_name]], ratio_name), "<=", 0.34),
        gate("resume_identical", exact.get("resume_identical"), "==", 1),
        gate("ranks_max_abs", exact.get("ranks_max_abs"), "<=", 1e-6),
        gate("world_gain", gain, ">=", 1.5),
        gate("world_final", final, ">=", 0.85),
    ]


def gate_values(result: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the measured values of the gates of a result by name."""
    return {row["name"]: row["value"] for row in result["gates"]}


def _judge_gates(changes: Sequence[Mapping[str, float]]) -> list[Gate]:
    """Return the gates of the held-out judge for its change in each shipped recipe."""
    drops = [{"drop": -row["value"], "low": row["low"]} for row in changes]
    return [
        gate("heldout_judge_drop", largest(drops, "drop"), "<=", 0.0),
        gate("heldout_judge_low", smallest(drops, "low"), ">=", -0.01),
    ]


def screened(arms: Mapping[str, Any]) -> list[str]:
    """Return the arms that get further seeds after all were run with seed 0. The rule was fixed before the runs.

    Of the arms compared with another arm, those whose last checkpoint moves 0.9 to 1.1 times as much as the base model
    on seed 0 come first, then the others by their distance from 1. Among equals, the higher score of the held-out
    judge at the chosen checkpoint counts.
    """
    rows = []
    for name in (*GROUPS["counter"], *GROUPS["losses"]):
        if name in arms and 0 in arms[name]["seeds"]:
            place = arms[name]["seeds"].index(0)
            motion = arms[name]["last"]["motion_ratio"]["by_seed"][place]
            far = max(0.0, abs(motion - 1) - 0.1)
            rows.append((far, -arms[name]["chosen"]["judge"]["by_seed"][place], name))
    return [name for *_, name in sorted(rows)[:KEPT]]


def missing(arms: Mapping[str, Any], exact: Mapping[str, Any], scale: Mapping[str, Any]) -> list[str]:
    """List what a complete report lacks, with the command that produces it."""
    command = "python -m benchmarks.dancegrpo"
    lacks = []
    for name in ARMS:
        wanted = SEEDS if name in (*SHIPPED, *GROUPS["control"], *GROUPS["hack"]) else SEEDS[:1]
        seeds = [seed for seed in wanted if seed not in arms.get(name, {}).get("seeds", [])]
        if seeds:
            lacks.append(f"{name}: {command} train --arms {name} --seeds {' '.join(map(str, seeds))}")
    if not exact:
        lacks.append(f"resume and two processes: {command} exact")
    if None in (scale.get("ddp_2gpu_speedup"), scale.get("two_gpu_max_abs")):
        lacks.append("several GPUs: python -m benchmarks.rl_scale")
    return lacks


def payload_of(out: Path) -> dict[str, Any]:
    """Return the content of the result file for what a folder has measured."""
    base, runs = read_runs(out)
    report = Report(base, runs)
    arms = {name: report.arm(name) for name in ARMS if name in runs}
    costs = costs_of(arms)
    file = out / EXACT
    exact = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    scale = gate_values(read_result(SCALE)) if (RESULTS / f"{SCALE}.json").is_file() else {}
    start = base["points"][BASE]
    return {
        "protocol": PROTOCOL,
        "settings": base["settings"],
        "base": {
            group: {name: statistics.fmean(column(start, group, name)) for name in ("right", "world", "judge", "clip")}
            for group in ("test", "valid", "guided")
        },
        "best_of": {
            "clips": base["settings"]["sizes"]["copies"],
            **{name: statistics.fmean(column(start, "best", name)) for name in ("right", "world")},
        },
        "arms": arms,
        "hacking": {name: report.hacking(name) for name in GROUPS["hack"] if name in runs},
        "costs": costs,
        "next": screened(arms),
        "missing": missing(arms, exact, scale),
        "gates": gates_of(arms, costs, exact, scale),
    }


def without_nan(value: Any) -> Any:
    """Return JSON values with None instead of NaN, for measures that no clip has."""
    if isinstance(value, Mapping):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and value != value else value


def check_target(output: str, *, replace: bool) -> None:
    """Check that the report does not replace a result of an earlier way of measuring by accident.

    Raises:
        UserError: the file has another protocol, and `replace` is false.
    """
    path = Path(output) if output.endswith(".json") else RESULTS / f"{output}.json"
    if path.is_file() and not replace and read_result(output).get("protocol") != PROTOCOL:
        raise UserError(
            f"{path} was measured in an earlier way, and its numbers and pictures cannot stand beside new ones: give"
            " --replace to replace them all, or -o another name"
        )


def write(out: Path, output: str, *, replace: bool = False) -> tuple[Path, dict[str, Any]]:
    """Write the result file; print the gates and what is missing.

    Raises:
        UserError: nothing is measured, files do not fit together, or `check_target` refuses.
    """
    check_target(output, replace=replace)
    payload = payload_of(out)
    payload = without_nan(payload)
    where = write_result(output, payload)
    for line in payload["missing"]:
        print(f"missing: {line}")
    for row in payload["gates"]:
        value = "not measured" if row["value"] is None else f"{row['value']:.4g}"
        print(f"{row['name']:28s} {value:>12s} {row['op']} {row['target']:g}  {'ok' if row['ok'] else 'MISSED'}")
    return where, payload
