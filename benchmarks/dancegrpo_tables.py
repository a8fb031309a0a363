"""Tables of docs/dancegrpo_results.md and docs/reward_hacking.md from `results/dancegrpo.json`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import docs_tables
from benchmarks.dancegrpo_arms import GROUPS, SHIPPED
from benchmarks.dancegrpo_measure import PROTOCOL
from benchmarks.gates import RESULTS, read_result
from benchmarks.lit_tables import table

DOCS = RESULTS.parent.parent / "docs"
FIRED = {
    "parted": "reward up, exact judge down",
    "gold_falls": "exact judge below its best",
    "patience": "`hacking_patience: 2`",
    "motion": "motion outside 0.85 to 1.15",
    "sharp": "sharpness outside 0.8 to 1.25",
    "diversity": "diversity below 0.8",
    "loss": "flow-matching loss above 1.1",
    "norm": "prediction norm outside 0.95 to 1.05",
    "bright": "brightness moved by 0.05",
}
"""Alarm -> head of its column. Ratios are to the base model."""
DIAGNOSED = {
    "motion/advantage_corr": "correlation of advantage and log motion",
    "motion/advantage_corr_used": "the same after `motion_residual`",
    "motion/log_group_std": "spread of log motion within groups",
}
"""Metric of the training -> head of its column."""
_COUNTER = ("nft", *GROUPS["control"], "fast", *GROUPS["counter"])
_LOSSES = ("nft", *GROUPS["losses"])
_RATIOS = ("diversity", "floor_diversity", "sharpness")
Result = Mapping[str, Any]


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _between(row: Mapping[str, Any], form: str = ".2f") -> str:
    if row["value"] is None:
        return ""
    return f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"


def _each(values: Iterable[float | None], form: str = ".2f") -> str:
    return ", ".join(_number(value, form) for value in values)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield from table(heads, rows) if rows else [docs_tables.NOTHING]


def shipped(result: Result) -> Iterator[str]:
    """Yield the table of the shipped recipes."""
    rows = []
    for name in SHIPPED:
        if (arm := result["arms"].get(name)) is not None:
            at, seeds = arm["chosen"], len(arm["seeds"])
            rows.append(
                [
                    f"`{arm['recipe']}`",
                    str(seeds),
                    _each(arm["chosen_steps"], ".0f"),
                    f"{at['right']['before']:.2f}",
                    _between(at["right"]["mean"]),
                    _between(at["gap_closed"]),
                    _between(at["judge"]["change"]),
                    f"{arm['forward_equivalents'] / 1000:.0f} k",
                    f"{arm['transformer_seconds']:.0f}",
                ]
            )
    if rows:
        best = result["best_of"]
        what = f"base model, best of {best['clips']} clips by the exact judge"
        rows.append([what, "", "", f"{result['base']['test']['right']:.2f}", f"{best['right']:.2f}", *[""] * 4])
    heads = ["recipe", "seeds", "chosen updates", "right before", "right", "gap closed"]
    heads += ["change of the held-out judge", "forward-equivalents", "s in the transformer"]
    yield from _table(heads, rows)


def shipped_beside(result: Result) -> Iterator[str]:
    """Yield the table of what else the shipped recipes change."""
    rows = []
    for name in SHIPPED:
        if (arm := result["arms"].get(name)) is not None:
            at = arm["chosen"]
            ratios = [_between(at[key]) for key in ("motion_to_exact", *(f"{each}_ratio" for each in _RATIOS))]
            rows.append([f"`{arm['recipe']}`", _each(at["motion_ratio"]["by_seed"]), *ratios])
    heads = ["recipe", "motion, each seed", "motion / exact clip", "diversity", "floor colours", "sharpness"]
    yield from _table(heads, rows)


def guided(result: Result) -> Iterator[str]:
    """Yield the table of the tuned models at the guidance of users."""
    rows = []
    for name in SHIPPED:
        if (arm := result["arms"].get(name)) is not None:
            at = arm["guided"]
            rows.append(
                [
                    f"`{arm['recipe']}`",
                    f"{at['right']['before']:.2f}",
                    _between(at["right"]["mean"]),
                    _between(at["judge"]["change"]),
                    _between(at["motion_ratio"]),
                ]
            )
    yield from _table(["recipe", "right before", "right", "change of the held-out judge", "motion"], rows)


def costs(result: Result) -> Iterator[str]:
    """Yield the table of the costs until a common score."""
    rows = [
        [
            f"`{result['arms'][name]['recipe']}`",
            f"{row['score']:.2f}",
            _number(row["forward_equivalents_ratio"]),
            _number(row["transformer_seconds_ratio"]),
        ]
        for name, row in result["costs"].items()
    ]
    heads = [
        "recipe",
        "common score",
        "forward-equivalents / `dancegrpo-tiny`",
        "transformer seconds / `dancegrpo-tiny`",
    ]
    yield from _table(heads, rows)


def _compared(result: Result, names: Iterable[str]) -> Iterator[str]:
    rows = []
    for name in names:
        if (arm := result["arms"].get(name)) is not None:
            against = arm.get("against", {}).get("chosen")
            rows.append(
                [
                    arm["what"],
                    str(len(arm["seeds"])),
                    _between(arm["chosen"]["right"]["mean"]),
                    "" if against is None else _between(against["right"]),
                    "" if against is None else _between(against["judge"]),
                    f"{arm['transformer_seconds']:.0f}",
                ]
            )
    heads = ["arm", "seeds", "right", "right minus reference", "held-out judge minus reference"]
    yield from _table([*heads, "s in the transformer"], rows)


def _beside(result: Result, names: Iterable[str]) -> Iterator[str]:
    rows = []
    for name in names:
        if (arm := result["arms"].get(name)) is not None:
            last = arm["last"]
            rows.append(
                [
                    arm["what"],
                    _each(last["motion_ratio"]["by_seed"]),
                    _between(last["motion_to_exact"]),
                    _between(last["floor_diversity_ratio"]),
                    f"{last['flow_matching_ratio']['value']:.2f}",
                    f"{last['prediction_norm_ratio']['value']:.2f}",
                ]
            )
    heads = ["arm", "motion, each seed", "motion / exact clip", "floor colours", "flow-matching loss"]
    yield from _table([*heads, "prediction norm"], rows)


def counter(result: Result) -> Iterator[str]:
    """Yield the table of the counter-measures, with the control and the recipes without them."""
    yield from _compared(result, _COUNTER)


def counter_beside(result: Result) -> Iterator[str]:
    """Yield the table of what else changes with the counter-measures."""
    yield from _beside(result, _COUNTER)


def diagnosis(result: Result) -> Iterator[str]:
    """Yield the table of what the training logs of all arms say about motion, means over runs."""
    rows = []
    for name in ("faithful", "fast", "nft", *GROUPS["control"], *GROUPS["counter"], *GROUPS["losses"]):
        if (arm := result["arms"].get(name)) is not None:
            found = [_logged(arm, key) for key in DIAGNOSED]
            rows.append([arm["what"], *(_number(value) for value in found), _between(arm["last"]["motion_ratio"])])
    yield from _table(["arm", *DIAGNOSED.values(), "motion at the end"], rows)


def _logged(arm: Result, key: str) -> float | None:
    values = [each for log in arm["log"].values() for each in log["means"].get(key, ()) if each is not None]
    return sum(values) / len(values) if values else None


def losses(result: Result) -> Iterator[str]:
    """Yield the table of the forward losses."""
    yield from _compared(result, _LOSSES)


def losses_beside(result: Result) -> Iterator[str]:
    """Yield the table of what else changes with the forward losses."""
    yield from _beside(result, _LOSSES)


def rewards(result: Result) -> Iterator[str]:
    """Yield the table of the five rewards, single and together: the change of each measure at the end."""
    measures = ("visual", "clip", "moves", "quality", "right", "judge", "world")
    rows = []
    for name in GROUPS["rewards"]:
        if (arm := result["arms"].get(name)) is not None:
            last = arm["last"]
            changes = [_between(last[measure]["change"]) for measure in measures]
            rows.append([arm["what"], str(len(arm["seeds"])), *changes, _between(last["motion_ratio"])])
    heads = ["trained reward", "seeds", "aesthetics", "alignment", "motion judge", "image quality", "right"]
    yield from _table([*heads, "`world_judge`", "`world`", "motion"], rows)


def gates(result: Result) -> Iterator[str]:
    """Yield the table of gates."""
    rows = [
        [
            f"`{row['name']}`",
            "none" if row["value"] is None else f"{row['value']:.4g}",
            f"{row['op']} {row['target']:.3g}",
            "yes" if row["ok"] else "no",
        ]
        for row in result["gates"]
    ]
    yield from _table(["gate", "measured", "target", "met"], rows)


def _pictures(names: Mapping[str, str]) -> Iterator[str]:
    there = [f"![{text}](../benchmarks/results/{name})" for name, text in names.items() if (RESULTS / name).is_file()]
    yield "\n\n".join(there) if there else docs_tables.NOTHING


def curves(result: Result) -> Iterator[str]:
    """Yield the pictures of the curves."""
    del result
    yield from _pictures(
        {
            "dancegrpo.png": "Measures of the shipped recipes over their cost, with intervals over seeds and prompts",
            "dancegrpo_counter.png": "The same for the counter-measures and losses",
        }
    )


def hacked(result: Result) -> Iterator[str]:
    """Yield the table of the steps at which rewards part and guards fire."""
    rows = [
        [
            result["arms"][name]["what"],
            seed,
            *("never" if run["fired"][guard] is None else f"{run['fired'][guard]:.0f}" for guard in FIRED),
        ]
        for name, seeds in result["hacking"].items()
        for seed, run in seeds.items()
    ]
    yield from _table(["trained reward", "seed", *FIRED.values()], rows)


def _points(result: Result, part: str) -> Iterator[str]:
    keys = ("reward", "world", "right", "judge", "motion", "sharp", "diversity", "loss", "norm")
    rows = []
    for name, seeds in result["hacking"].items():
        for seed, run in seeds.items():
            series = run[part].items() if part == "back" else ((f"{row['step']:.0f}", row) for row in run[part])
            rows += [[f"`{name}`", seed, where, *(_number(row.get(key)) for key in keys)] for where, row in series]
    heads = ["arm", "seed", "weights" if part == "back" else "updates", "trained reward", "`world`", "right"]
    heads += ["`world_judge`", "motion", "sharpness", "diversity", "flow-matching loss", "prediction norm"]
    yield from _table(heads, rows)


def series(result: Result) -> Iterator[str]:
    """Yield the table of every checkpoint of the hacked runs."""
    yield from _points(result, "series")


def back(result: Result) -> Iterator[str]:
    """Yield the table of raw weights, averaged weights, and mixtures with the base model."""
    yield from _points(result, "back")


def hack_curves(result: Result) -> Iterator[str]:
    """Yield the picture of the curves of the hacked runs."""
    del result
    yield from _pictures({"dancegrpo_hack.png": "Measures of the hacked runs over their updates, with intervals"})


PAGES: dict[str, dict[str, Callable[[Result], Iterator[str]]]] = {
    "dancegrpo_results.md": {
        **{"shipped": shipped, "shipped_beside": shipped_beside, "guided": guided, "costs": costs},
        **{"counter": counter, "counter_beside": counter_beside, "losses": losses, "losses_beside": losses_beside},
        "diagnosis": diagnosis,
        **{"rewards": rewards, "curves": curves, "gates": gates},
    },
    "reward_hacking.md": {"hacked": hacked, "series": series, "back": back, "hack_curves": hack_curves},
}
"""Page -> its tables."""


def write_pages(output: str = "dancegrpo", folder: Path = DOCS) -> None:
    """Write the tables of both pages; a result of an earlier way of measuring counts as none."""
    place = Path(output) if output.endswith(".json") else RESULTS / f"{output}.json"
    result = read_result(output) if place.is_file() else None
    if result is not None and result.get("protocol") != PROTOCOL:
        result = None
    for page, makers in PAGES.items():
        docs_tables.write(folder / page, docs_tables.of_result(result, makers))
