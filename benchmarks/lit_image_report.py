"""The image part of `results/lit.json`, its tables in docs/lit_results.md, and the sheet of pictures.

Intervals are 95 % bootstrap intervals. A draw resamples classes (the same for all arms) and the training seeds of each
arm. The intervals of Frechet distances are shifted so that their centre is the distance of all pictures, because a
draw has fewer different pictures, which changes all distances by about the same amount. The number of each guideline
and the rule by which it holds were written down before any measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks import docs_tables
from benchmarks.gates import RESULTS
from benchmarks.lit_image_arms import ALL_ARMS, ARMS, SEEDS, TEACHERS, TRUTH, names_of
from benchmarks.lit_image_folder import is_whole, read_measures
from benchmarks.lit_sections import put_section
from benchmarks.lit_tables import table
from benchmarks.worldweaver_along import rounded
from benchmarks.worldweaver_stats import interval
from postgen.errors import UserError
from postgen.files import replacing
from postgen.video import read_picture

DOCS = RESULTS.parent.parent / "docs"
PAGE, SHEET = DOCS / "lit_results.md", DOCS / "images" / "lit_image_sheet.webp"
OURS = "lit"
NAMES = {"truth": "true stills", **TEACHERS, **{name: arm.about for name, arm in ARMS.items()}}
"""Names of the arms on the page, in the order of its rows."""
GUIDELINES = (
    ("1, a convolution is enough", "no_conv", "no convolution"),
    ("2, few heads", "heads_8", "8 heads instead of 2"),
    ("3, a converged teacher", "young", "initialised from a young teacher"),
    ("4, all but attention is inherited", "inherit_all", "queries, keys and values inherited too"),
    ("4, all but attention is inherited", "inherit_none", "nothing inherited"),
    ("5, noise and variance are distilled", "no_distillation", "no distillation"),
)
"""(guideline, arm that departs from it, how the arm differs). A guideline holds if the arm's Frechet distance is above
that of LiT."""
_GAP, _LEFT, _ROW = 2, 120, 64


def section_of(measures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the image part of the result file from the content of `measures.json`.

    Raises:
        UserError: no run was measured, or the runs were measured with different settings.
    """
    measured: Mapping[str, Any] = measures["measured"]
    if not measured:
        raise UserError("no run was measured yet: run benchmarks.lit_image first")
    first = next(iter(measured.values()))
    if odd := [name for name, each in measured.items() if each["settings"] != first["settings"]]:
        raise UserError(f"{', '.join(odd)} were measured with other settings: measure all runs with the same settings")
    arms = {name: runs for name in NAMES if (runs := _runs(measured, name))}
    return {
        "settings": first["settings"],
        "measured_on": {"device": first["device"], "versions": first["versions"]},
        "arms": {name: _arm(name, runs, measures["losses"]) for name, runs in arms.items()},
        "missing": [name for name in (TRUTH, *names_of(ALL_ARMS, SEEDS)) if name not in measured],
        "while_trained": {
            name: [{"step": row["step"], "all_right": row["eval_all_right"]} for row in rows]
            for name, rows in measures["judged"].items()
        },
        "against": {base: _against(arms, base) for base in ("teacher", OURS) if base in arms},
        "guidelines": [*_guidelines(arms)],
    }


def _runs(measured: Mapping[str, Any], arm: str) -> dict[str, Mapping[str, Any]]:
    """Return the measurements of an arm by seed."""
    return {name.split(".")[1]: each for name, each in sorted(measured.items()) if name.split(".")[0] == arm}


def _by_class(runs: Mapping[str, Mapping[str, Any]], what: str) -> Tensor:
    """Return the mean of a number over the pictures of each class, (seeds, classes)."""
    settings = next(iter(runs.values()))["settings"]
    rows = torch.tensor([each["rows"][what] for each in runs.values()], dtype=torch.float64)
    return rows.unflatten(1, (-1, settings["per_class"])).mean(2)


def _arm(name: str, runs: Mapping[str, Mapping[str, Any]], losses: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "seeds": list(runs),
        "fd": _distance(runs),
        "fd_by_seed": [r["fd"] for r in runs.values()],
    }
    for what in ("all_right", "count", "colour", "shape", "event", "score"):
        found[what] = interval(_by_class(runs, what))
    found["all_right_by_seed"] = _by_class(runs, "all_right").mean(1).tolist()
    found["parameters"] = next(iter(runs.values())).get("parameters")
    last = [losses[key] for seed in runs if (key := f"{name}.{seed}") in losses]
    names = ("step", "loss", "noise_loss", "task_loss", "output_loss", "variance_loss", "step_time")
    found["last"] = [{key: row[key] for key in names if key in row} for row in last]
    return rounded(found)  # type: ignore[no-any-return]


def _drawn(runs: Mapping[str, Mapping[str, Any]], seed: int) -> Tensor | None:
    """Return the mean distance over resampled seeds, for each draw of classes; None if a seed has no distances."""
    rows = [each["fd_draws"] for each in runs.values()]
    if not all(rows):
        return None
    draws = torch.tensor(rows, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(draws), draws.shape, generator=generator)
    return draws.gather(0, picked).mean(0)


def _distance(
    runs: Mapping[str, Mapping[str, Any]], base: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, float] | None:
    """Return the Frechet distance of an arm, or its difference to that of `base`, with its interval."""
    draws, other = _drawn(runs, 1), None if base is None else _drawn(base, 2)
    if draws is None or (base is not None and other is None):
        return None
    value = _mean(runs) - (_mean(base) if base is not None else 0.0)
    spread = draws if other is None else draws - other
    spread = spread - spread.mean() + value
    low, high = spread.quantile(torch.tensor([0.025, 0.975], dtype=spread.dtype)).tolist()
    return {"value": value, "low": low, "high": high}


def _mean(runs: Mapping[str, Mapping[str, Any]]) -> float:
    return sum(each["fd"] for each in runs.values()) / len(runs)


def _against(arms: Mapping[str, Any], base: str) -> dict[str, Any]:
    """Return the differences of every arm to the arm `base`: Frechet distance, and share of right pictures."""
    other = arms[base]
    return {
        name: rounded(
            {
                "fd": _distance(runs, other),
                "all_right": interval(_by_class(runs, "all_right"), _by_class(other, "all_right")),
                "seeds": [len(runs), len(other)],
            }
        )
        for name, runs in arms.items()
        if name != base
    }


def _guidelines(arms: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for guideline, arm, how in GUIDELINES:
        if arm not in arms or OURS not in arms:
            continue
        fd = _distance(arms[arm], arms[OURS])
        right = interval(_by_class(arms[arm], "all_right"), _by_class(arms[OURS], "all_right"))
        seeds = [len(arms[arm]), len(arms[OURS])]
        told = {"fd": fd, "all_right": right, "seeds": seeds, "holds": verdict(fd)}
        yield {"guideline": guideline, "arm": arm, "how": how, **rounded(told)}


def verdict(difference: Mapping[str, float] | None) -> str:
    """Return in words whether departing from a guideline makes the Frechet distance larger.

    >>> verdict({"value": 2, "low": 1, "high": 3}), verdict({"value": 0, "low": -1, "high": 1})
    ('holds', 'no difference seen')
    """
    if difference is None:
        return "not measured"
    if difference["low"] > 0:
        return "holds"
    return "does not hold" if difference["high"] < 0 else "no difference seen"


def report(results: Path, output: str | Path, *, docs: bool) -> None:
    """Write the image part of the result file from `results/measures.json`, and optionally the page.

    Args:
        results: folder with the collected results.
        output: name of the result file, or a path that ends in .json.
        docs: whether to write the page and its sheet too.

    Raises:
        UserError: `measures.json` or the sheet is missing, the file is damaged or empty, or its results are those of a
            small test, which must be written to a separate file.
    """
    place, drawn = results / "measures.json", results / "sheet.webp"
    if not place.is_file():
        raise UserError(f"there is no {place}: run benchmarks.lit_image first")
    section = section_of(read_measures(place))
    settings = section["settings"]
    if not is_whole(settings["classes"], settings["per_class"]) and (docs or Path(output).suffix != ".json"):
        raise UserError(
            f"{place} is from a small test ({settings['classes']} classes, pictures of each: {settings['per_class']}):"
            " write it to a separate file with -o PATH.json, without --docs"
        )
    if docs and not drawn.is_file():
        raise UserError(f"there is no {drawn}, which the page shows: run benchmarks.lit_image again to draw it")
    print(f"written to {put_section('image', section, path=output)}")
    if docs:
        SHEET.parent.mkdir(parents=True, exist_ok=True)
        with replacing(SHEET) as part:
            part.write_bytes(drawn.read_bytes())
        docs_tables.write(PAGE, docs_tables.of_result({"image": section}, TABLES))


def _cell(found: Mapping[str, float] | None, digits: int, *, signed: bool = False) -> str:
    if found is None:
        return ""
    sign = "+" if signed else ""
    value, low, high = (f"{found[key]:{sign}.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def image_table(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of all arms."""
    section = result["image"]
    heads = ["", "seeds", "Frechet distance", "right", "minus the teacher's", "colour", "shape", "places"]
    rows = []
    for name, arm in section["arms"].items():
        less = section["against"].get("teacher", {}).get(name, {}).get("all_right")
        shares = [f"{arm[what]['value']:.3f}" for what in ("colour", "shape", "event")]
        whole = [_cell(arm["fd"], 2), _cell(arm["all_right"], 3), _cell(less, 3, signed=True)]
        rows.append([f"{NAMES[name]} (`{name}`)", str(len(arm["seeds"])), *whole, *shares])
    yield from table(heads, rows)
    yield from docs_tables.lacking(section["missing"])
    yield from ("", f"![The same classes from the same noise, a row for each arm]({SHEET.relative_to(DOCS)})")


def guideline_table(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of the guidelines."""
    rows = result["image"]["guidelines"]
    if not rows:
        yield docs_tables.NOTHING
        return
    heads = ["guideline", "changed in the arm", "Frechet distance minus LiT's", "right minus LiT's", "seeds", "result"]
    yield from table(
        heads,
        [
            [row["guideline"], row["how"], _cell(row["fd"], 2, signed=True), _cell(row["all_right"], 3, signed=True),
             " and ".join(map(str, row["seeds"])), row["holds"]]
            for row in rows
        ],
    )  # fmt: skip


TABLES = {"image": image_table, "guidelines": guideline_table}


def sheet(strips: Path, names: Sequence[str], place: Path) -> None:
    """Draw one row of pictures for each arm; the pictures of a column have the same class and noise.

    Args:
        strips: folder with the rows, NAME.webp.
        names: names ARM.SEED; only the first run of each arm is shown.
        place: path of the sheet.
    """
    first: dict[str, Image.Image] = {}
    for arm in NAMES:
        found = sorted(name for name in names if name.split(".")[0] == arm)
        if found and (strips / f"{found[0]}.webp").is_file():
            picture = read_picture(strips / f"{found[0]}.webp")
            first[arm] = picture.resize((picture.width * _ROW // picture.height, _ROW), Image.Resampling.NEAREST)
    if not first:
        return
    width = _LEFT + max(picture.width for picture in first.values())
    whole = Image.new("RGB", (width, len(first) * (_ROW + _GAP)), "white")
    pen = ImageDraw.Draw(whole)
    for row, (arm, picture) in enumerate(first.items()):
        pen.text((4, row * (_ROW + _GAP) + _ROW // 2 - 8), arm, "black", ImageFont.load_default(12))
        whole.paste(picture, (_LEFT, row * (_ROW + _GAP)))
    with replacing(place) as part:
        whole.save(part, "WEBP", quality=90, method=4)
