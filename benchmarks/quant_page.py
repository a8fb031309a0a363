"""The tables and pictures of docs/quantization_results.md, from `results/quant.json` and `results/quant_law.json`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import docs_tables
from benchmarks.gates import RESULTS
from benchmarks.lit_tables import digits, table
from benchmarks.quant_arms import BLOCKS, CONTROLS, FORMATS, PLANES, RECIPES
from benchmarks.quant_figure import draw

PAGE = RESULTS.parent.parent / "docs" / "quantization_results.md"
IMAGES = PAGE.parent / "images"
SHEETS = {
    "quant_w4a4": ("omniquant-w4a4.0", "Three clips of the exact model, each above the clip with OmniQuant at W4A4"),
    "quant_w2": ("block_ap-w2.0", "Three clips of the exact model, each above the clip with Block-AP at 2 bits"),
}
"""Picture -> the arm that it shows, and its description. The arms are fixed before any run."""
FIGURE = "quant_figure"
FIGURE_TEXT = (
    "Left: PSNR of each recipe over the bits per weight, inputs exact. Right: crest factors of the layers' inputs,"
    " with the format of 4 bits that the advisor chooses"
)
Section = Mapping[str, Any]


def spread(row: Mapping[str, float], places: int = 3) -> str:
    """Return a value with its interval as text."""
    return f"{row['value']:+.{places}f} [{row['low']:+.{places}f}, {row['high']:+.{places}f}]"


def spec_text(format: str) -> str:
    """Return a format of `FORMATS` in the notation of `QuantSpec`."""
    given = FORMATS[format]
    act = f", inputs `{given['act']}`" if "act" in given else ""
    return f"`{given['weight']}`{act}" + (f", rotated by {given['rotate']}" if "rotate" in given else "")


HEADS = ("recipe", "seeds", "bits", "MB", "PSNR, dB", "velocity error", "judge", "drop", "drop of the score", "s")


def _cells(arm: Mapping[str, Any]) -> list[str]:
    return [
        f"`{arm['recipe']}`",
        str(arm["seeds"]),
        f"{arm['bits']:.2f}",
        f"{arm['bytes'] / 1e6:.1f}",
        f"{arm['psnr']['value']:.2f} [{arm['psnr']['low']:.2f}, {arm['psnr']['high']:.2f}]",
        f"{arm['velocity']:.4f}",
        f"{arm['student_right']:.3f}",
        spread(arm["drop"]),
        spread(arm["score_drop"]),
        "" if arm["seconds"] is None else digits(arm["seconds"]),
    ]


def formats(section: Section, names: Sequence[str]) -> Iterator[str]:
    """Yield the table of the recipes in some formats."""
    arms = section["arms"]
    rows = [
        [spec_text(format), *_cells(arms[f"{recipe}-{format}"])]
        for format in names
        for recipe in RECIPES
        if f"{recipe}-{format}" in arms
    ]
    yield from table(["format", *HEADS], rows) if rows else [docs_tables.NOTHING]


def papers(section: Section) -> Iterator[str]:
    """Yield the table of the papers' claims."""
    rows = []
    for each in section["claims"]:
        if "gain_db" in each:
            said = f"`{each['better']}` minus `{each['worse']}`: {spread(each['gain_db'], 2)} dB"
        else:
            said = f"exponent {spread(each['exponent'])}"
        rows.append([each["paper"], each["claim"], said, each["verdict"]])
    yield from table(["paper", "claim", "measured", ""], rows) if rows else [docs_tables.NOTHING]


def crossovers(section: Section) -> Iterator[str]:
    """Yield the table of pairs of integers and floating point."""
    rows = []
    for each in (section["advice"] or {"pairs": ()})["pairs"]:
        found = each["measured"]
        at = f"{found:.3f}" if isinstance(found, float) else f"none: {found} better everywhere"
        low, middle, high = each["crest_quartiles"]
        rows.append(
            [
                f"`{each['pair'][0]}`, `{each['pair'][1]}`",
                each["of"] + (f", rotated by {each['rotate']}" if each["rotate"] else ""),
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
                f"{each['predicted']:.3f}",
                at,
                f"{each['integers_db']:.2f}, {each['floating_db']:.2f}",
                f"{each['layers_where_integers_win']:.2f}",
            ]
        )
    heads = [
        "pair",
        "of",
        "crest factor (quartiles)",
        "predicted crossover",
        "measured",
        "QSNR, dB",
        "layers where integers win",
    ]
    yield from table(heads, rows) if rows else [docs_tables.NOTHING]


def gates(section: Section) -> Iterator[str]:
    """Yield the table of gates."""
    rows = []
    for row in section["gates"]:
        value = "not measured" if row["value"] is None else f"{row['value']:.4g}"
        target = "above 0" if 0 < row["target"] < 1e-8 else f"{row['op']} {row['target']:g}"
        rows.append([f"`{row['name']}`", value, target, "yes" if row["ok"] else "no"])
    yield from table(["gate", "measured", "target", "met"], rows)


def pictures(section: Section) -> Iterator[str]:
    """Yield links to the existing pictures."""
    del section
    named = {f"{FIGURE}.png": FIGURE_TEXT, **{f"{name}.webp": text for name, (_, text) in SHEETS.items()}}
    links = [f"![{text}](images/{name})" for name, text in named.items() if (IMAGES / name).is_file()]
    yield "\n\n".join(links) if links else docs_tables.NOTHING


TABLES: dict[str, Callable[[Section], Iterator[str]]] = {
    "gates": gates,
    "papers": papers,
    "pictures": pictures,
    "weights": lambda section: formats(section, ("w4a16", "w3", "w2")),
    "planes": lambda section: formats(section, (*PLANES, *CONTROLS.values())),
    "inputs": lambda section: formats(section, ("w8a8", "f8a8", "w4a8", "w4a8i", "w4a4")),
    "blocks": lambda section: formats(section, BLOCKS),
    "crossovers": crossovers,
}


def law_numbers(law: Section) -> Iterator[str]:
    """Yield the table of the fitted law."""
    rows = [[f"`{name}`", spread(each)] for name, each in law["exponents"].items()]
    rows.append(["error of the fitted runs", f"{law['fit_error']:.3f}"])
    rows.append(["error, each run predicted from the others", f"{law['leave_one_out']:.3f}"])
    missing = law["heldout_error"] is None
    rows.append(["error of the held-out runs", "not defined" if missing else f"{law['heldout_error']:.3f}"])
    yield from table(["", "value [90 % interval]"], rows)


def law_runs(law: Section) -> Iterator[str]:
    """Yield the table of the runs of the law."""
    rows = [
        [
            f"{run['parameters']:,}",
            f"{run['tokens']:,}",
            str(run["group"]),
            f"{run['exact_loss']:.5f}",
            f"{run['delta']:.5f}",
            f"{run['predicted']:.5f}",
            "yes" if run["held_out"] else "",
        ]
        for run in law["runs"]
    ]
    yield from table(["parameters", "tokens", "group", "exact loss", "added loss", "fit", "held out"], rows)


LAW_TABLES: dict[str, Callable[[Section], Iterator[str]]] = {"law_numbers": law_numbers, "law_runs": law_runs}


def copy_sheets(out: Path) -> None:
    """Copy the sheets of the page from a folder of jobs."""
    for name, (arm, _) in SHEETS.items():
        sheet = out / "sheets" / f"{arm}.webp"
        if sheet.is_file():
            shutil.copyfile(sheet, IMAGES / f"{name}.webp")


def write(result: Section | None, law: Section | None, page: Path = PAGE, images: Path = IMAGES) -> None:
    """Draw the figure, and write the tables of the results into the page."""
    if result is not None:
        draw(result, images / f"{FIGURE}.png")
    made = docs_tables.of_result(result, TABLES)
    fitted = law if law is not None and law.get("exponents") else None
    docs_tables.write(page, {**made, **docs_tables.of_result(fitted, LAW_TABLES)})
