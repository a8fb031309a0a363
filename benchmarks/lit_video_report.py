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
from benchmarks.gates import RESULTS, Gate, gate, read_result
from benchmarks.lit_sections import put_section
from benchmarks.lit_tables import table
from benchmarks.lit_video_arms import ARMS, TYPES, read_results, winner_of
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
        numbers["layers_by_seed"] = [row["layers"] for row in parts]
        numbers["training_seconds"] = [row["training_seconds"] for row in parts]
        found[name] = numbers | {"settings": parts[0]["settings"]}
    return found


def section_of(out: Path, embedded: Path | None) -> dict[str, Any]:
    """Return the video part of the result, with everything that has been measured so far.

    Raises:
        UserError: nothing has been measured.
    """
    rows = read_results(out)
    if not rows and embedded is None:
        raise UserError(f"{out} has no results of students: run --group types first")
    section: dict[str, Any] = {"arms": arms_of(rows)}
    if any(row["job"].split(".")[1] == "half" for row in rows):
        section["winner"] = winner_of(rows)
    if embedded is not None:
        there = read_results(embedded)
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
    """Write the video part of the result, and with `docs` also the tables and pictures of the page."""
    section = section_of(out, embedded)
    found = gates_of(section)
    print(put_section(SECTION, section, found, output))
    for row in found:
        print(f"{row['name']:24s} {_number(row)} {row['op']} {row['target']:g} {'ok' if row['ok'] else 'MISSED'}")
    if docs:
        winner = section.get("winner")
        draw({"lit_video": out / "jobs" / f"{winner}.{SHOWN}.0.png"}, IMAGES)
        if embedded is not None:
            name = next((name for name, arm in section["embedded"]["one"].items() if arm is shipped(section)), "")
            draw({"lit_embedded": embedded / "jobs" / f"{name}.0.png"}, IMAGES)
        write_page(read_result(output))


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
    rows = [
        [f"{TYPES[kind]}, {ARMS[arm].what}", *_cells(section["arms"][f"{kind}.{arm}"])]
        for arm in ("half", "all")
        for kind in TYPES
        if f"{kind}.{arm}" in section["arms"]
    ]
    yield from table(["layer type", *HEADS], rows) if rows else [docs_tables.NOTHING]


def fractions(section: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of the winner's arms."""
    winner = section.get("winner")
    names = [name for name in ARMS if name != "all" and f"{winner}.{name}" in section["arms"]]
    rows = []
    for name in names:
        arm = section["arms"][f"{winner}.{name}"]
        each = ", ".join(f"{value:.3f}" for value in arm["by_seed"])
        rows.append([ARMS[name].what, *_cells(arm), each, _timed(arm)])
    yield from (
        table([TYPES.get(str(winner), ""), *HEADS, "by seed", "timed as"], rows) if rows else [docs_tables.NOTHING]
    )


def _timed(arm: Mapping[str, Any]) -> str:
    if arm["timed_as"] is None:
        return ""
    return f"`{arm['timed_as']}`" + ("" if arm["timed"] else ", not timed yet")


def blocks(section: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of chosen blocks, by arm and seed."""
    rows = []
    for name, arm in section["arms"].items():
        for seed, layers in enumerate(arm["layers_by_seed"]):
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
    yield from table(["student", "prompts", *HEADS, "adapter, MB"], rows) if rows else [docs_tables.NOTHING]


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
    del argv
    write_page(read_result("lit") if (RESULTS / "lit.json").is_file() else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
