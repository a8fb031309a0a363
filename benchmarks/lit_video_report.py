"""The video part of `results/lit.json`, its gates, and the tables of docs/lit_video.md.

python -m benchmarks.lit_video_report     # writes the tables again from the existing result
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import docs_tables
from benchmarks.command import without_options
from benchmarks.gates import RESULTS, Gate, gate, read_result
from benchmarks.lit_sections import put_section, section_before
from benchmarks.lit_tables import table
from benchmarks.lit_video_arms import ALL_LINEAR, ARMS, EMBEDDED_MODEL, MEASURED, TYPES, best_of, read_results
from benchmarks.lit_video_measure import Measured, compared
from postgen.errors import UserError
from postgen.files import replacing

PAGE = RESULTS.parent.parent / "docs" / "lit_video.md"
IMAGES = PAGE.parent / "images"
PICTURES = {
    "lit_video": "Three clips of the fine teacher, each above the clip of its student with three quarters of the"
    " blocks converted, same prompt and seed, nine frames along time",
    "lit_embedded": "Three clips of the embedded model, each above the clip with its adapter, same prompt and seed",
}
"""Sheets of the page, `images/NAME.webp` -> their description."""
SECTION = "video"
SHOWN = "three_quarters"
"""Arm whose density and motion the gates use."""
GATES = (
    "half_linear_drop",
    "three_quarters_drop",
    "motion_ratio",
    "density_of_shown_plan",
    "embedded_drop",
    "adapter_mb",
)
"""Names of all gates."""
EMBEDDED = ("half-new", "half")
"""Arms of the embedded model's two students."""
_KEPT = ("layers", "share", "layer_density", "plan_density", "timed_as", "adapter_bytes", "device")


def arms_of(rows: Sequence[Mapping[str, Any]], group: str = "one") -> dict[str, dict[str, Any]]:
    """Return the numbers of every arm, `TYPE.ARM`, over all its seeds."""
    seeds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if group in row["measured"]:
            seeds[row["job"].rpartition(".")[0]].append(row)
    found = {}
    for name, parts in seeds.items():
        ours, theirs = ([Measured.from_json(row[who][group]) for row in parts] for who in ("measured", "teacher"))
        numbers = compared(ours, theirs) | {key: parts[0][key] for key in _KEPT}
        numbers["seed_numbers"] = [int(row["job"].rpartition(".")[2]) for row in parts]
        numbers["layers_by_seed"] = [row["layers"] for row in parts]
        numbers["training_seconds"] = [row["training_seconds"] for row in parts]
        found[name] = numbers | {"settings": parts[0]["settings"]}
    return found


def section_of(out: Path, embedded: Path | None, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the video part of the result, with everything that has been measured so far.

    Args:
        out: folder of the fine teacher's students; without results, `before` has their numbers.
        embedded: folder of the embedded model's students; with None, `before` has their numbers.
        before: the video part of an earlier report.

    Raises:
        UserError: nothing has been measured, or the results of a folder have different settings.
    """
    rows, there, before = read_results(out), read_results(embedded) if embedded else [], before or {}
    if not rows and embedded is None:
        raise UserError(f"{out} has no results of students: run --group types first")
    if not there and embedded is not None:
        raise UserError(f"{embedded} has no results of students: run --group embedded first, or --unpack its results")
    section: dict[str, Any] = {key: before[key] for key in ("arms", "winner", "embedded") if key in before}
    if rows or "arms" not in section:
        section |= {"arms": arms_of(rows), "winner": best_of(rows)}
    if there:
        section["embedded"] = {"one": arms_of(there), "two": arms_of(there, "two")}
    times = [str(row["plan"]) for row in read_result("lit_speed")["rows"] if row.get("part") == "step"]
    for arm in section["arms"].values():
        arm["timed"] = arm["timed_as"] in times
    return section


def gates_of(section: Mapping[str, Any]) -> list[Gate]:
    """Return the gates for the measured values; gates of values that are not measured yet are left out."""
    rows: list[Gate] = []
    arms, winner = section["arms"], section.get("winner")

    def end(name: str, arm: Mapping[str, Any] | None, limit: float) -> None:
        if arm is not None:
            rows.append(gate(name, arm["drop"]["high"], "<=", limit))

    end("half_linear_drop", _whole(arms.get(f"{winner}.half"), "half"), 0.02)
    shown = _whole(arms.get(f"{winner}.{SHOWN}"), SHOWN)
    end("three_quarters_drop", shown, 0.05)
    if shown is not None:
        ratio = (shown["motion_ratio"] or {}).get("value")
        rows += [gate("motion_ratio", ratio, ">=", 0.9), gate("motion_ratio", ratio, "<=", 1.1)]
        rows.append(gate("density_of_shown_plan", shown["plan_density"], "<=", 0.35))
    if (best := shipped(section)) is not None:
        end("embedded_drop", best, 0.03)
        rows.append(gate("adapter_mb", best["adapter_bytes"] / 1e6, "<=", 3))
    return rows


def _whole(arm: Mapping[str, Any] | None, name: str) -> Mapping[str, Any] | None:
    """Return an arm if all of its seeds are measured, else None."""
    return arm if arm is not None and arm["seeds"] == len(ARMS[name].seeds) else None


def shipped(section: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the numbers of the embedded model's student to ship: the least drop among adapters of at most 3 MB."""
    arms = section.get("embedded", {}).get("one", {})
    small = [arm for arm in arms.values() if arm["adapter_bytes"] <= 3e6] or [*arms.values()]
    return min(small, key=lambda arm: arm["drop"]["value"], default=None)


def write(out: Path, embedded: Path | None, output: str, *, docs: bool) -> None:
    """Write the video part of the result, and with `docs` also the tables and pictures of the page.

    What is in only one of the folders `out` and `embedded` replaces only its own numbers of an earlier report.

    Raises:
        UserError: see `section_of`; or the results are those of a small test, which must be written to a separate
            file.
    """
    section = section_of(out, embedded, section_before(SECTION, output))
    _check_whole(section, output, docs=docs)
    found = gates_of(section)
    print(put_section(SECTION, section, found, output, GATES))
    for row in found:
        print(f"{row['name']:24s} {_number(row)} {row['op']} {row['target']:g} {'ok' if row['ok'] else 'MISSED'}")
    if docs:
        winner = section.get("winner")
        draw({"lit_video": out / "jobs" / f"{winner}.{SHOWN}.0.png"}, IMAGES)
        if embedded is not None:
            name = next((name for name, arm in section["embedded"]["one"].items() if arm is shipped(section)), "")
            draw({"lit_embedded": embedded / "jobs" / f"{name}.0.png"}, IMAGES)
        write_page(read_result(output))


def _check_whole(section: Mapping[str, Any], output: str, *, docs: bool) -> None:
    if not docs and Path(output).suffix == ".json":
        return
    fine, small = section["arms"].values(), section.get("embedded", {}).get("one", {}).values()
    least = min(arm["prompts"] for arm in (*fine, *small))
    if least < MEASURED:
        raise UserError(
            f"the results are from a small test ({least:,} prompts, not {MEASURED:,}): write them to a separate file"
            " with -o PATH.json, without --docs"
        )
    if any(arm["settings"].get("model") == EMBEDDED_MODEL for arm in fine):
        raise UserError("--out has students of the embedded model: give their folder with --embedded")
    if any(arm["settings"].get("model", EMBEDDED_MODEL) != EMBEDDED_MODEL for arm in small):
        raise UserError("--embedded has students of another model: give their folder with --out")


def draw(sheets: Mapping[str, Path], folder: Path) -> None:
    """Write the existing sheets of clips as small pictures for the documentation."""
    for name, sheet in sheets.items():
        if sheet.is_file():
            with replacing(folder / f"{name}.webp") as part, Image.open(sheet) as picture:
                picture.save(part, "WEBP", quality=80, method=6)


# Tables.


def _number(row: Gate) -> str:
    return "none" if row["value"] is None else f"{row['value']:.4f}"


def _spread(row: Mapping[str, Any]) -> str:
    return f"{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def _cells(arm: Mapping[str, Any]) -> list[str]:
    ratio, psnr = arm["motion_ratio"], arm["psnr"]
    return [
        str(arm["seeds"]),
        f"{arm['teacher_right']:.3f}",
        f"{arm['student_right']:.3f}",
        _spread(arm["drop"]),
        f"{psnr['value']:.1f}",
        "" if ratio is None else f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
        f"{arm['plan_density']:.3f}",
    ]


HEADS = ("seeds", "teacher right", "student right", "drop", "PSNR, dB", "motion", "pairs")


def types(section: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of layer types at half of the blocks, and of models whose attention is all linear."""
    wanted = [(kind, arm) for arm in ("half", "all") for kind in (TYPES if arm == "half" else ALL_LINEAR)]
    there = {(kind, arm): found for kind, arm in wanted if (found := section["arms"].get(f"{kind}.{arm}"))}
    if not there:
        yield docs_tables.NOTHING
        return
    rows = [[f"{TYPES[kind]}, {ARMS[arm].what}", *_cells(found)] for (kind, arm), found in there.items()]
    yield from table(["layer type", *HEADS], rows)
    yield from docs_tables.lacking([f"{kind}.{arm}" for kind, arm in wanted if (kind, arm) not in there])


def fractions(section: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of the winner's arms."""
    winner = section.get("winner")
    if winner is None:
        yield docs_tables.NOTHING
        return
    rows, missing = [], []
    for name in (name for name in ARMS if name != "all"):
        arm = section["arms"].get(f"{winner}.{name}")
        there = [] if arm is None else arm["seed_numbers"]
        missing += [f"{winner}.{name}.{seed}" for seed in ARMS[name].seeds if seed not in there]
        if arm is not None:
            each = ", ".join(f"{value:.3f}" for value in arm["by_seed"])
            rows.append([ARMS[name].what, *_cells(arm), each, _timed(arm)])
    yield from table([TYPES[winner], *HEADS, "by seed", "timed as"], rows)
    yield from docs_tables.lacking(missing)


def _timed(arm: Mapping[str, Any]) -> str:
    if arm["timed_as"] is None:
        return ""
    return f"`{arm['timed_as']}`" + ("" if arm["timed"] else ", not timed yet")


def blocks(section: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of chosen blocks, by arm and seed."""
    rows = []
    for name, arm in section["arms"].items():
        for seed, layers in zip(arm["seed_numbers"], arm["layers_by_seed"], strict=True):
            numbers = ", ".join(str(place) for place, kind in enumerate(layers) if kind != "softmax")
            rows.append([f"`{name}`", str(seed), numbers])
    yield from table(["arm", "seed", "converted blocks"], rows) if rows else [docs_tables.NOTHING]


def embedded(section: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of the embedded model's students."""
    found = section.get("embedded", {})
    rows = [
        [
            f"`{name}`",
            {"one": "one body", "two": "two bodies"}[group],
            *_cells(arm),
            f"{arm['adapter_bytes'] / 1e6:.2f}",
        ]
        for group in ("one", "two")
        for name, arm in found.get(group, {}).items()
    ]
    if not rows:
        yield docs_tables.NOTHING
        return
    yield from table(["student", "prompts", *HEADS, "adapter, MB"], rows)
    there = {name.split(".")[1] for name in found["one"]}
    yield from docs_tables.lacking([arm for arm in EMBEDDED if arm not in there])


def gates(section: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of gates."""
    rows = [
        [f"`{row['name']}`", _number(row), f"{row['op']} {row['target']:g}", "yes" if row["ok"] else "no"]
        for row in gates_of(section)
    ]
    yield from table(["gate", "measured", "target", "met"], rows) if rows else [docs_tables.NOTHING]


def sheets(section: Mapping[str, Any]) -> Iterator[str]:
    """Yield links to the existing pictures."""
    del section
    rows = [f"![{text}](images/{name}.webp)" for name, text in PICTURES.items() if (IMAGES / f"{name}.webp").is_file()]
    yield "\n\n".join(rows) if rows else docs_tables.NOTHING


TABLES: dict[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "types": types,
    "fractions": fractions,
    "blocks": blocks,
    "sheets": sheets,
    "embedded": embedded,
    "gates": gates,
}


def write_page(result: Mapping[str, Any] | None, page: Path = PAGE) -> None:
    """Write the tables of a result into the page."""
    docs_tables.write(page, docs_tables.of_result(None if result is None else result.get(SECTION), TABLES))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables into the page."""
    without_options("benchmarks.lit_video_report", __doc__, argv)
    write_page(read_result("lit") if (RESULTS / "lit.json").is_file() else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
