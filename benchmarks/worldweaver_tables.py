"""Write the tables of `docs/worldweaver_results.md` from `results/worldweaver.json`. Nothing is measured.

A table is between `<!-- table: NAME -->` and `<!-- end -->`. `python -m benchmarks.worldweaver_tables` replaces the
tables by those of the current result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import docs_tables
from benchmarks.command import without_options
from benchmarks.gates import RESULTS, read_result
from benchmarks.lit_tables import table

PAGE = RESULTS.parent.parent / "docs" / "worldweaver_results.md"
NAMES = {
    "a": "a: chunk after chunk, clean RGB memory",
    "b": "b: noise on RGB memory",
    "c": "c: depth, not in memory",
    "d": "d: clean depth in memory",
    "e": "e: d with three groups in flight (ours)",
    "f": "f: e with independent levels",
    "g2": "g: e with two groups",
    "g5": "g: e with five groups",
    "h_recent": "h: e, memory `recent`",
    "h_uniform": "h: e, memory `uniform`",
    "h_depth_sim": "h: e, memory `depth_sim`",
    "h_camera": "h: e, memory `camera`",
    "i": "i: e with flow",
    "j": "e with placed memory",
    "sliding": "stock model, sliding window of latents",
    "sliding_pixels": "stock model, sliding window of frames",
    "ceiling": "autoencoder's round trip of the truth",
}
"""Names of the arms in the page, in their order; other arms come last, under their own names."""
COLUMNS = {
    "score": "start-end contrast",
    "colour.delta_e.last": "colour, dE",
    "permanence.after_absence": "back after absence",
    "permanence.always": "bodies in place",
    "background.psnr.last": "background, dB",
    "revisit.all.psnr": "revisit, dB",
    "revisit.memory.gap_db": "revisit gap, dB",
    "motion.total": "motion",
    "motion.least": "least part",
    "seam": "seam",
    "depth.abs_rel.last": "depth error",
}
FEWER = (
    *("score", "colour.delta_e.last", "permanence.after_absence", "permanence.always", "background.psnr.last"),
    *("revisit.all.psnr", "motion.total"),
)
"""Columns of the tables of differences."""
OURS = "e"
"""Our arm. It was fixed before anything was measured."""
COMPARED = ("d", OURS, "j")
"""Arms with which the table of differences compares."""
PARTS = {
    OURS: ("f", "g2", "g5", "h_recent", "h_uniform", "h_depth_sim", "h_camera", "i"),
    "d": ("b", "c"),
    "h_camera": ("j",),
}
"""Arm -> arms that differ from it in one part."""


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _spread(row: Mapping[str, Any] | None) -> str:
    """Format a difference with its interval."""
    return "" if row is None else f"{row['value']:+.3g} [{row['low']:+.3g}, {row['high']:+.3g}]"


def _arms(arms: Mapping[str, Any]) -> list[str]:
    return sorted(arms, key=lambda name: (list(NAMES).index(name) if name in NAMES else len(NAMES), name))


def arms(part: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of the means of all arms."""

    def cells(name: str) -> Iterator[str]:
        row = part["arms"][name]
        yield NAMES.get(name, name)
        yield str(len(row["seeds"]))
        for number in COLUMNS:
            yield _short(row["numbers"].get(number, {}).get("value"))

    yield from table(["arm", "seeds", *COLUMNS.values()], [[*cells(name)] for name in _arms(part["arms"])])


def seeds(part: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of the means of each seed, for arms with several seeds."""
    rows = []
    for name in _arms(part["arms"]):
        row = part["arms"][name]
        if len(row["seeds"]) > 1:
            told = [", ".join(map(_short, row["numbers"].get(number, {}).get("by_seed", []))) for number in FEWER]
            rows.append([NAMES.get(name, name), *told])
    yield from table(["arm", *(COLUMNS[number] for number in FEWER)], rows)


def differences(part: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of differences from the baselines."""
    rows = []
    for base, others in part["against"].items():
        if base in PARTS and base != "d":  # these bases serve the table of parts only
            continue
        for name in _arms({key: None for key in others if key in COMPARED}):
            told = [_spread(others[name].get(number, {}).get("difference")) for number in FEWER]
            rows.append([f"{name} - {base}", *told])
    yield from table(["", *(COLUMNS[number] for number in FEWER)], rows)


def parts(part: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of arms that differ in one part."""
    rows = []
    for base, names in PARTS.items():
        for name in names:
            if numbers := part["against"].get(base, {}).get(name):
                told = [_spread(numbers.get(number, {}).get("difference")) for number in FEWER]
                rows.append([f"{NAMES[name]} - {base}", *told])
    yield from table(["", *(COLUMNS[number] for number in FEWER)], rows)


def thesis(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of slopes and ends of latent errors."""
    heads = [
        "depth of, RGB of",
        "slope of depth",
        "slope of RGB",
        "difference",
        "end of depth",
        "end of RGB",
        "difference",
    ]
    rows = []
    for row in result["thesis"]:
        cells = [f"{row['depth_of']}, {row['rgb_of']}"]
        for what in ("slope", "last"):
            values = [_short((row[what][key] or {}).get("value")) for key in ("depth", "rgb")]
            cells += [*values, _spread(row[what]["difference"])]
        rows.append(cells)
    yield from table(heads, rows)


def gates(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of gates."""
    rows = [
        [f"`{row['name']}`", "not measured" if row["value"] is None else _short(row["value"]),
         f"{row['op']} {row['target']:g}", "yes" if row["ok"] else "no"]
        for row in result["gates"]
    ]  # fmt: skip
    yield from table(["gate", "measured", "target", "met"], rows)


def _of_long(make: Callable[[Mapping[str, Any]], Iterator[str]]) -> Callable[[Mapping[str, Any]], Iterator[str]]:
    return lambda result: make(result["long"]) if "long" in result else iter([docs_tables.NOTHING])


TABLES: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "arms": arms,
    "seeds": seeds,
    "differences": differences,
    "parts": parts,
    "thesis": thesis,
    "long": _of_long(arms),
    "long_differences": _of_long(differences),
    "gates": gates,
}


def filled(text: str, result: Mapping[str, Any] | None) -> str:
    """Return the page with new tables; a result of None means that nothing was measured."""
    return docs_tables.filled(text, docs_tables.of_result(result, TABLES))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables into the page."""
    without_options("benchmarks.worldweaver_tables", __doc__, argv)
    there = (RESULTS / "worldweaver.json").is_file()
    docs_tables.write(PAGE, docs_tables.of_result(read_result("worldweaver") if there else None, TABLES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
